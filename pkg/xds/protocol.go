package xds

import "strings"

// DetectProtocol says how a port is treated, by the first of these that knows:
// its appProtocol, the part of its name before the first "-", its number. What
// none of them knows is ProtocolAuto. An appProtocol that is not known means
// TCP: somebody said what the port speaks, and it is none of those that a
// sidecar understands. Upper and lower case are the same. Empty strings and
// port 0 say nothing.
func DetectProtocol(appProtocol, portName string, port uint16) Protocol {
	if appProtocol != "" {
		if p, ok := namedProtocol(strings.ToLower(appProtocol)); ok {
			return p
		}
		return ProtocolTCP
	}
	name := strings.ToLower(portName)
	if name == "grpc-web" || strings.HasPrefix(name, "grpc-web-") {
		return ProtocolHTTP
	}
	prefix, _, _ := strings.Cut(name, "-")
	if p, ok := namedProtocol(prefix); ok {
		return p
	}
	if serverFirst(port) {
		return ProtocolTCP
	}
	return ProtocolAuto
}

// namedProtocol knows the names that Kubernetes, its Gateway API and service
// meshes use in appProtocol and in port names. TLS is opaque to a sidecar that
// has no certificate for it.
func namedProtocol(name string) (Protocol, bool) {
	switch name {
	case "http", "http1", "ws", "kubernetes.io/ws", "grpc-web":
		return ProtocolHTTP, true
	case "http2", "h2c", "kubernetes.io/h2c":
		return ProtocolHTTP2, true
	case "grpc":
		return ProtocolGRPC, true
	case "tcp", "tls", "https", "wss", "kubernetes.io/wss",
		"amqp", "amqps", "ftp", "imap", "imaps", "kafka", "ldap", "ldaps", "mariadb",
		"mongo", "mongodb", "mqtt", "mysql", "nats", "pop3", "pop3s", "postgres",
		"postgresql", "redis", "sftp", "smtp", "smtps", "ssh", "telnet", "vnc":
		return ProtocolTCP, true
	}
	return "", false
}

// serverFirst knows the ports of protocols in which the client waits for the
// server's first word, so that looking at the client's first bytes would only
// delay every connection. Others, such as PostgreSQL (5432), Redis (6379),
// MongoDB (27017), Kafka (9092) or DNS (53), are not here: there the client
// speaks first, and its first bytes tell at once that it is not HTTP.
func serverFirst(port uint16) bool {
	switch port {
	case 21, // FTP control, RFC 959: 220 greeting
		22,   // SSH, RFC 4253: both sides send a version, many clients wait
		23,   // Telnet: the server opens the negotiation
		25,   // SMTP, RFC 5321: 220 greeting
		110,  // POP3, RFC 1939: +OK greeting
		119,  // NNTP, RFC 3977: 200 greeting
		143,  // IMAP, RFC 9051: * OK greeting
		587,  // SMTP submission, RFC 6409
		3306, // MySQL and MariaDB: initial handshake packet
		4190, // ManageSieve, RFC 5804: capabilities
		4222, // NATS: INFO
		5900: // VNC, RFC 6143: protocol version
		return true
	}
	return false
}
