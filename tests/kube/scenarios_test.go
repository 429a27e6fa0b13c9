package kube

// scenarios in the order in which they run.
func scenarios() []scenario {
	return []scenario{
		{name: "older-pod-adopted", run: (*suite).adopted},
		{name: "calls", run: (*suite).calls},
		{name: "services", run: (*suite).services},
		{name: "doors", run: (*suite).doors},
		{name: "dual-stack", run: (*suite).dualStack},
		{name: "egress", run: (*suite).egress},
		{name: "routes", run: (*suite).routes},
		{name: "probes", run: (*suite).probes},
		{name: "job", run: (*suite).job},
		{name: "shared-pid-namespace", run: (*suite).sharedPID},
		{name: "user-namespace", run: (*suite).userNamespace},
		{name: "own-cgroup", run: (*suite).ownCgroup, lab: true},
		{name: "other-backend", run: (*suite).otherBackend},
		{name: "bad-annotation", run: (*suite).badAnnotation},
		{name: "cni-verbs", run: (*suite).cniVerbs, lab: true},
		{name: "prometheus", run: (*suite).prometheus, lab: true},
		{name: "agent-killed", run: (*suite).agentKilled, lab: true},
		{name: "agent-upgraded", run: (*suite).agentUpgraded},
		{name: "agent-away", run: (*suite).agentAway},
		{name: "envoy-killed", run: (*suite).envoyKilled, lab: true},
		{name: "api-server-away", run: (*suite).apiAway, lab: true},
		{name: "daemons-restarted", run: (*suite).daemonsRestarted, lab: true},
		{name: "fallback", run: (*suite).fallback, lab: true},
		{name: "rolling", run: (*suite).rolling},
		{name: "bursts", run: (*suite).bursts},
		{name: "node-down-and-up", run: (*suite).nodeDown, lab: true},
		{name: "reinstalled", run: (*suite).reinstalled},
	}
}
