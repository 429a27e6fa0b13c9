package netns

import (
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"testing"

	"github.com/sluicemesh/sluice/tests/need"
)

func TestUserns(t *testing.T) {
	need.Root(t)
	if own, err := Userns("/proc/self/ns/net"); own != 0 || err != nil {
		t.Fatalf("own network namespace: owner %d, error %v; want 0", own, err)
	}
	child := exec.Command("cat")
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 200000, Size: 1000}, {ContainerID: 1000, HostID: 300000, Size: 1000}},
	}
	hold, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatalf("start a process in a user namespace: %v", err)
	}
	defer func() { _ = hold.Close(); _ = child.Wait() }()

	owner, err := Userns(fmt.Sprintf("/proc/%d/ns/net", child.Process.Pid))
	if owner == 0 || err != nil {
		t.Fatalf("network namespace of another user namespace: owner %d, error %v", owner, err)
	}
	for uid, want := range map[uint32]uint32{0: 200000, 999: 200999, 1337: 300337} {
		if got, err := HostUID("/proc", owner, uid); got != want || err != nil {
			t.Errorf("host's ID of %d is %d, error %v; want %d", uid, got, err, want)
		}
	}
	if _, err := HostUID("/proc", owner, 2000); err == nil {
		t.Error("an ID that is not mapped has one outside")
	}
	_ = hold.Close()
	_ = child.Wait()
	if _, err := HostUID("/proc", owner, 0); !errors.Is(err, ErrNoProcess) {
		t.Errorf("after the last process ended the error is %v, want %v", err, ErrNoProcess)
	}
}
