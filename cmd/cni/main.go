package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
)

// codeRefused is the plugin's own CNI error code (100 and above are free for
// that): the agent answered that it cannot do what was asked.
const codeRefused = 100

func main() { os.Exit(newPlugin().run(os.Getenv("CNI_COMMAND"), os.Stdout)) }

// A plugin answers one request.
type plugin struct {
	agent func(socket string) cniapi.Handler
	log   *slog.Logger
	// result is what ADD prints, kept until nothing can fail any more: there
	// must be one document on stdout.
	result json.RawMessage
}

// newPlugin returns one that asks this node's agent.
func newPlugin() *plugin {
	return &plugin{
		agent: func(socket string) cniapi.Handler { return cniapi.NewClient(cniapi.ClientOptions{Socket: socket}) },
		log:   slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
}

// run answers the request that is in the environment and on stdin.
func (p *plugin) run(command string, stdout io.Writer) int {
	funcs := skel.CNIFuncs{
		Add:    p.guard(p.add),
		Del:    p.guard(p.del),
		Check:  p.guard(p.check),
		GC:     p.guard(p.gc),
		Status: p.guard(p.status),
	}
	err := skel.PluginMainFuncsWithError(funcs, versions(), "CNI plugin sluice-cni")
	if err != nil && command == "DEL" {
		// A pod must be able to go whatever is wrong. The agent finds out
		// itself that it is gone.
		p.log.Warn("DEL is not passed on", "err", err)
		return 0
	}
	answer, code := any(p.result), 0
	switch {
	case err != nil:
		answer, code = err, 1
	case p.result == nil:
		return 0
	}
	if err := json.NewEncoder(stdout).Encode(answer); err != nil {
		p.log.Error("write answer", "err", err)
		return 1
	}
	return code
}

// versions are those of the CNI specification that the plugin speaks.
func versions() version.PluginInfo { return version.VersionsStartingFrom("0.3.1") }

// guard makes an error of a panic: the runtime must get an answer that it can
// read. A panic that left no trace but an exit code would be hard to find.
func (p *plugin) guard(verb func(*skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) (err error) {
		defer func() {
			if r := recover(); r != nil {
				p.log.Error("panic", "panic", r, "stack", string(debug.Stack()))
				err = types.NewError(types.ErrInternal, fmt.Sprintf("panic in sluice-cni: %v", r), "")
			}
		}()
		return verb(args)
	}
}

// add returns once the agent has redirected the pod's traffic.
func (p *plugin) add(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	result, err := p.ask(c, args, cniapi.Handler.Add)
	if err != nil {
		return err
	}
	p.result = result
	return nil
}

// check is an error unless the pod's redirection is whole.
func (p *plugin) check(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	_, err = p.ask(c, args, cniapi.Handler.Check)
	return err
}

// ask passes a pod to the agent, unless the sandbox is no pod or one of an
// excluded namespace, and returns prevResult.
func (p *plugin) ask(c conf, args *skel.CmdArgs, verb func(cniapi.Handler, context.Context, cniapi.Attachment) error) (json.RawMessage, error) {
	raw, prev, err := c.prevResult()
	if err != nil {
		return nil, err
	}
	pod, ok, err := parsePod(args.Args)
	if err != nil {
		return nil, err
	}
	if !ok || slices.Contains(c.ExcludeNamespaces, pod.namespace) {
		return raw, nil
	}
	a := attachment(c, pod, args)
	if a.Interfaces, err = prev.interfaces(args.IfName); err != nil {
		return nil, err
	}
	if err := verb(p.agent(c.Socket), context.Background(), a); err != nil {
		return nil, agentError(err)
	}
	return raw, nil
}

// del tells the agent that a pod is gone. It needs neither namespace nor
// prevResult, both of which may be missing by then. run lets no error out.
func (p *plugin) del(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	pod, ok, err := parsePod(args.Args)
	if err != nil {
		return err
	}
	if !ok || slices.Contains(c.ExcludeNamespaces, pod.namespace) {
		return nil
	}
	return p.agent(c.Socket).Del(context.Background(), attachment(c, pod, args))
}

// gc passes on which attachments of the network there still are.
func (p *plugin) gc(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	valid, err := c.validAttachments()
	if err != nil {
		return err
	}
	if err := p.agent(c.Socket).GC(context.Background(), c.Name, valid); err != nil {
		return agentError(err)
	}
	return nil
}

// status is an error while ADD would fail; the runtime then reports the node's
// network as not ready.
func (p *plugin) status(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	if err := p.agent(c.Socket).Status(context.Background()); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	return nil
}

func attachment(c conf, pod pod, args *skel.CmdArgs) cniapi.Attachment {
	return cniapi.Attachment{
		AttachmentID: cniapi.AttachmentID{ContainerID: args.ContainerID, IfName: args.IfName},
		Network:      c.Name,
		Netns:        args.Netns,
		PodNamespace: pod.namespace,
		PodName:      pod.name,
		PodUID:       pod.uid,
	}
}

// agentError tells an agent that did not answer, which may pass, from one that
// refused. The agent's words stay as they are: runtime and kubelet name plugin,
// verb and pod around them.
func agentError(err error) error {
	if errors.Is(err, cniapi.ErrUnavailable) {
		return types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	return types.NewError(codeRefused, err.Error(), "")
}
