package xds

import "testing"

func TestDetectProtocol(t *testing.T) {
	for _, tc := range []struct {
		appProtocol, name string
		port              uint16
		want              Protocol
	}{
		{want: ProtocolAuto},
		{name: "web", port: 8080, want: ProtocolAuto},
		{name: "http", want: ProtocolHTTP},
		{name: "http-metrics", want: ProtocolHTTP},
		{name: "HTTP-Metrics", want: ProtocolHTTP},
		{name: "httpx", want: ProtocolAuto},
		{name: "http2-api", want: ProtocolHTTP2},
		{name: "grpc", want: ProtocolGRPC},
		{name: "grpc-web", want: ProtocolHTTP},
		{name: "grpc-web-admin", want: ProtocolHTTP},
		{name: "grpc-website", want: ProtocolGRPC},
		{name: "https", want: ProtocolTCP},
		{name: "tcp-http", want: ProtocolTCP},
		{name: "mysql", port: 9999, want: ProtocolTCP},
		{appProtocol: "http", name: "tcp-x", port: 3306, want: ProtocolHTTP},
		{appProtocol: "kubernetes.io/h2c", want: ProtocolHTTP2},
		{appProtocol: "kubernetes.io/ws", want: ProtocolHTTP},
		{appProtocol: "kubernetes.io/wss", want: ProtocolTCP},
		{appProtocol: "gRPC", want: ProtocolGRPC},
		{appProtocol: "https", want: ProtocolTCP},
		{appProtocol: "example.com/own", name: "http", want: ProtocolTCP},
		{name: "db", port: 3306, want: ProtocolTCP},
		{name: "http", port: 3306, want: ProtocolHTTP},
		{port: 25, want: ProtocolTCP},
		{port: 4222, want: ProtocolTCP},
		{port: 5432, want: ProtocolAuto},
		{port: 6379, want: ProtocolAuto},
		{port: 53, want: ProtocolAuto},
	} {
		if got := DetectProtocol(tc.appProtocol, tc.name, tc.port); got != tc.want {
			t.Errorf("DetectProtocol(%q, %q, %d) = %q, want %q", tc.appProtocol, tc.name, tc.port, got, tc.want)
		}
	}
}
