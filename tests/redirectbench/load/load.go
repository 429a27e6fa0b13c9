package load

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"time"
)

// What the ports serve, in their order.
const (
	Echo  = iota // sends back what it reads
	Sink         // reads to the end, then says how many bytes these were
	HTTP         // HTTP/1.1
	Hello        // says hello and closes
	Hello2
	// Services is their number.
	Services
)

// A Request is one measurement.
type Request struct {
	// Op is "connect", "round", "stream", "http", "hello", "hold" or "release".
	Op string
	// Addrs are dialled in turn.
	Addrs []netip.AddrPort
	// N counts connections, round trips, writes or requests.
	N int
	// Size is that of a message or of a write, in bytes.
	Size int
	// Parallel connections of "http", and whether each lasts for one request.
	Parallel int
	Close    bool
}

// A Result is what came of it.
type Result struct {
	Err string
	// Elapsed is the time for all.
	Elapsed time.Duration
	// P50 and P99 are of the N times, where these are taken one by one.
	P50, P99 time.Duration
	// Resent segments of the connections that were made, and those connections
	// that took half a second or longer.
	Resent, Slow int
}

// Run is the process: "serve ADDRESS PORT" serves on the ports from PORT on and
// says "ready", "call" reads requests. It returns the exit code.
func Run(args []string, in io.Reader, out io.Writer) int {
	var err error
	switch {
	case len(args) == 3 && args[0] == "serve":
		err = serve(args[1], args[2], out)
	case len(args) == 1 && args[0] == "call":
		err = obey(in, out)
	default:
		err = errors.New("usage: serve ADDRESS PORT | call")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		return 1
	}
	return 0
}

func serve(addr, port string, out io.Writer) error {
	ip, err := netip.ParseAddr(addr)
	if err != nil {
		return err
	}
	first, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return fmt.Errorf("read port %q: %w", port, err)
	}
	failed := make(chan error, Services)
	for service := range Services {
		l, err := listen(netip.AddrPortFrom(ip, uint16(first)+uint16(service)))
		if err != nil {
			return err
		}
		go func() { failed <- accept(l, service) }()
	}
	fmt.Fprintln(out, "ready")
	return <-failed
}

func obey(in io.Reader, out io.Writer) error {
	runtime.LockOSThread() // the calls below block, one at a time
	c := &caller{}
	requests, results := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var req Request
		if err := requests.Decode(&req); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		res, err := c.call(req)
		if err != nil {
			res.Err = fmt.Sprintf("%s %v: %v", req.Op, req.Addrs, err)
		}
		if err := results.Encode(res); err != nil {
			return fmt.Errorf("write result: %w", err)
		}
	}
}
