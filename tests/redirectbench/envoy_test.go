package redirectbench

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/translate"
	"github.com/sluicemesh/sluice/tests/redirectbench/load"
)

// protocols are those of the services of package load, in their order.
var protocols = [load.Services]xds.Protocol{xds.ProtocolTCP, xds.ProtocolTCP, xds.ProtocolHTTP, xds.ProtocolTCP, xds.ProtocolTCP}

// object is a message of Envoy's in JSON.
type object = map[string]any

// A config is what Sluice serves a sidecar, as static resources, so that no
// server for it runs beside the measurement.
type config struct {
	tb        testing.TB
	byName    map[string]object // by type and name
	listeners []any
	clusters  []any
}

// clientConfig is the client's sidecar's: the service, and twice the same with
// ports that the client dials itself.
func clientConfig(tb testing.TB, client, server netip.Addr) []byte {
	tb.Helper()
	c := newConfig(tb, client)
	c.service("bench", vip, vipPort, server, appPort)
	c.service("explicit", client, explicitOut, server, explicitIn)
	c.service("same", client, sameOut, server, sameIn)
	return c.bootstrap()
}

// service adds one with its endpoints on one pod. What is not dialled at its
// address by way of 15001 gets sockets.
func (c *config) service(name string, vip netip.Addr, first uint16, pod netip.Addr, target uint16) {
	c.tb.Helper()
	s := xds.Service{Namespace: "bench", Name: name, VIPs: []netip.Addr{vip}}
	for i, p := range protocols {
		s.Ports = append(s.Ports, xds.ServicePort{
			Port: first + uint16(i), Protocol: p,
			Endpoints: []xds.Endpoint{{Addr: netip.AddrPortFrom(pod, target+uint16(i))}},
		})
	}
	made := len(c.listeners)
	c.add(c.translator().Service(s))
	if name == "bench" {
		return
	}
	for _, l := range c.listeners[made:] {
		bind(l.(object))
	}
}

// serverConfig is the server's sidecar's.
func serverConfig(tb testing.TB, server netip.Addr) []byte {
	tb.Helper()
	pod := xds.Pod{Namespace: "bench", Name: "server", Addrs: []netip.Addr{server}}
	for i, p := range protocols {
		pod.Inbound = append(pod.Inbound, xds.InboundPort{Port: appPort + uint16(i), Protocol: p})
	}
	c := newConfig(tb, server)
	c.add(c.translator().Pod(pod))
	for i := range uint16(load.Services) {
		in := translate.InboundName(appPort + i)
		app := object{"address": server.String(), "portValue": appPort + i}

		// A cluster with the one address that it has to lead to.
		l, cl := c.copyOf("Listener "+in), c.copyOf("Cluster "+in)
		l = renamed(tb, l, in, explicitCluster(i))
		bind(l)
		l["address"] = object{"socketAddress": object{"address": server.String(), "portValue": explicitIn + i}}
		cl = renamed(tb, cl, in, explicitCluster(i))
		cl["type"] = "STATIC"
		delete(cl, "lbPolicy")
		delete(cl, "cleanupInterval")
		cl["loadAssignment"] = object{"clusterName": explicitCluster(i), "endpoints": []any{
			object{"lbEndpoints": []any{object{"endpoint": object{"address": object{"socketAddress": app}}}}},
		}}
		c.listeners, c.clusters = append(c.listeners, l), append(c.clusters, cl)

		// The cluster of captured connections, told its destination.
		l = c.copyOf("Listener " + in)
		l["name"] = fmt.Sprintf("same/%d", appPort+i)
		bind(l)
		l["address"] = object{"socketAddress": object{"address": server.String(), "portValue": sameIn + i}}
		chain := l["defaultFilterChain"].(object)
		chain["filters"] = append([]any{destination(netip.AddrPortFrom(server, appPort+i))}, chain["filters"].([]any)...)
		c.listeners = append(c.listeners, l)
	}
	return c.bootstrap()
}

// explicitCluster is the name of the cluster, and the listener, of a service.
func explicitCluster(service uint16) string { return fmt.Sprintf("explicit/%d", appPort+service) }

// bind gives a listener a socket, with the options of those of captured
// connections.
func bind(l object) {
	l["bindToPort"] = true
	l["tcpBacklogSize"] = 65535
	l["tcpKeepalive"] = object{"keepaliveTime": 60, "keepaliveInterval": 15, "keepaliveProbes": 4}
}

// destination is a filter that says where a connection is to go.
func destination(to netip.AddrPort) object {
	return object{"name": "destination", "typedConfig": object{
		"@type": "type.googleapis.com/envoy.extensions.filters.network.set_filter_state.v3.Config",
		"onNewConnection": []any{object{
			"objectKey":    "envoy.network.transport_socket.original_dst_address",
			"formatString": object{"textFormatSource": object{"inlineString": to.String()}},
		}},
	}}
}

func newConfig(tb testing.TB, pod netip.Addr) *config {
	tb.Helper()
	c := &config{tb: tb, byName: map[string]object{}}
	c.add(c.translator().Base(xds.OutboundPassthrough))
	if pod.IsValid() && len(c.listeners) == 0 {
		tb.Fatal("no listeners")
	}
	return c
}

// translator is the one that the agent uses. Nothing writes an access log: what
// a disk takes is not what is measured.
func (c *config) translator() *translate.Translator {
	c.tb.Helper()
	t, err := translate.New(translate.Options{NoAccessLog: true})
	if err != nil {
		c.tb.Fatal(err)
	}
	return t
}

func (c *config) add(resources []xds.Resource, err error) {
	c.tb.Helper()
	if err != nil {
		c.tb.Fatal(err)
	}
	var added []string
	for _, r := range resources {
		m, err := r.Body.UnmarshalNew()
		if err != nil {
			c.tb.Fatal(err)
		}
		b, err := protojson.Marshal(m)
		if err != nil {
			c.tb.Fatal(err)
		}
		var body object
		if err := json.Unmarshal(b, &body); err != nil {
			c.tb.Fatal(err)
		}
		key := r.TypeURL[strings.LastIndex(r.TypeURL, ".")+1:] + " " + r.Name
		c.byName[key] = body
		added = append(added, key)
	}
	for _, key := range added {
		kind, name, _ := strings.Cut(key, " ")
		body := c.byName[key]
		switch kind {
		case "Cluster":
			if body["type"] == "EDS" { // the endpoints do not change
				body["type"] = "STATIC"
				delete(body, "edsClusterConfig")
				body["loadAssignment"] = c.byName["ClusterLoadAssignment "+name]
			}
			c.clusters = append(c.clusters, body)
		case "Listener":
			c.inlineRoutes(body)
			c.listeners = append(c.listeners, body)
		}
	}
}

// inlineRoutes puts routes where they would be fetched to.
func (c *config) inlineRoutes(v any) {
	switch v := v.(type) {
	case object:
		if rds, ok := v["rds"].(object); ok {
			v["routeConfig"] = c.byName["RouteConfiguration "+rds["routeConfigName"].(string)]
			delete(v, "rds")
		}
		for _, child := range v {
			c.inlineRoutes(child)
		}
	case []any:
		for _, child := range v {
			c.inlineRoutes(child)
		}
	}
}

func (c *config) copyOf(key string) object {
	c.tb.Helper()
	return renamed(c.tb, c.byName[key], "", "")
}

// renamed copies a message, with one name for another in all of it.
func renamed(tb testing.TB, o object, from, to string) object {
	tb.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		tb.Fatal(err)
	}
	var out object
	if from != "" {
		b = []byte(strings.ReplaceAll(string(b), `"`+from+`"`, `"`+to+`"`))
	}
	if err := json.Unmarshal(b, &out); err != nil {
		tb.Fatal(err)
	}
	return out
}

// bootstrap is the one that all sidecars start with, with the resources in it.
func (c *config) bootstrap() []byte {
	c.tb.Helper()
	var boot object
	if err := yaml.Unmarshal(xds.Bootstrap(), &boot); err != nil {
		c.tb.Fatal(err)
	}
	delete(boot, "dynamic_resources")
	boot["static_resources"] = object{"listeners": c.listeners, "clusters": c.clusters}
	b, err := json.Marshal(boot)
	if err != nil {
		c.tb.Fatal(err)
	}
	return b
}
