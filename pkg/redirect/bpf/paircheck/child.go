package paircheck

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/vishvananda/netlink"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// A Hello is what a child says first: the cookie of its network namespace.
type Hello struct {
	Cookie uint64 `json:"cookie"`
}

// An Answer is what a child says for each Options that it is given.
type Answer struct {
	Results []Result `json:"results,omitempty"`
	Gains   []Gain   `json:"gains,omitempty"`
	Err     string   `json:"err,omitempty"`
}

// mtu is that of most pods' interfaces. With loopback's own, 64 KiB, TCP would
// be cheaper than between pods.
const mtu = 1500

// Child is the part that runs in a process, a network namespace and a cgroup of
// its own: it says Hello, then answers each Options from in until that ends. It
// brings loopback up; the namespace must be one that ends with the process.
func Child(in io.Reader, out io.Writer) error {
	cookie, err := netns.OwnCookie()
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetMTU(lo, mtu); err != nil {
		return fmt.Errorf("set MTU of loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	say, hear := json.NewEncoder(out), json.NewDecoder(in)
	if err := say.Encode(Hello{Cookie: cookie}); err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	for {
		var o Options
		if err := hear.Decode(&o); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("read what to check: %w", err)
		}
		var a Answer
		if o.Measure {
			a.Gains, err = compare(o)
		} else {
			a.Results, err = Run(o)
		}
		if err != nil {
			a.Err = err.Error()
		}
		if err := say.Encode(a); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
}
