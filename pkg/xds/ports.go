package xds

// Ports of the sidecar. The bootstrap and the generated listeners have them;
// the data plane must lead to the same ones, which a test of the agent holds.
const (
	PortAdmin    uint16 = 15000
	PortOutbound uint16 = 15001
	PortInbound  uint16 = 15006
	PortHealth   uint16 = 15021
)
