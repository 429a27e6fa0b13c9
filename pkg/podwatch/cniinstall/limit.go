package cniinstall

import "time"

// A limiter lets a few changes through at once and then ever fewer, so that two
// installers that undo each other's work do not keep the node busy.
type limiter struct {
	burst   int           // changes at once
	refill  time.Duration // until one more may
	backoff time.Duration // between changes beyond the burst, at most

	tokens float64
	asked  time.Time     // when take was called last
	pause  time.Duration // between changes now; 0 while there are tokens
	until  time.Time     // when the present pause ends
}

// firstPause is what the pauses begin with; each is twice the one before.
const firstPause = time.Second

// take uses up one change and returns 0, or returns how long to wait.
func (l *limiter) take(now time.Time) time.Duration {
	idle := now.Sub(l.asked)
	switch {
	case l.asked.IsZero() || idle > l.calm():
		l.tokens, l.pause, l.until = float64(l.burst), 0, time.Time{}
	case l.pause == 0:
		l.tokens = min(float64(l.burst), l.tokens+float64(idle)/float64(l.refill))
	}
	l.asked = now
	switch wait := l.until.Sub(now); {
	case wait > 0:
		return wait
	case l.pause == 0 && l.tokens >= 1:
		l.tokens--
		return 0
	case l.pause > 0:
		l.pause = min(2*l.pause, l.backoff)
		l.until = now.Add(l.pause)
		return 0
	}
	l.pause = min(firstPause, l.backoff)
	l.until = now.Add(l.pause)
	return l.pause
}

// calm is after how long without changes everything starts anew.
func (l *limiter) calm() time.Duration { return 2 * l.backoff }

// fighting says whether changes come faster than they are let through.
func (l *limiter) fighting(now time.Time) bool { return l.pause > 0 && now.Sub(l.asked) <= l.calm() }
