package cniinstall

// Network configurations as installers of the field write them: their files,
// by name. The first that sorts is the primary one.
func realWorld() map[string]map[string]string {
	return map[string]map[string]string{
		"kindnet": {"10-kindnet.conflist": `
{
	"cniVersion": "0.3.1",
	"name": "kindnet",
	"plugins": [
	{
		"type": "ptp",
		"ipMasq": false,
		"ipam": {
			"type": "host-local",
			"dataDir": "/run/cni-ipam-state",
			"routes": [
				{ "dst": "0.0.0.0/0" }
			],
			"ranges": [
				[ { "subnet": "10.244.0.0/24" } ]
			]
		}
		,
		"mtu": 1500
	},
	{
		"type": "portmap",
		"capabilities": {
			"portMappings": true
		}
	}
	]
}
`},
		"calico": {
			"10-calico.conflist": `{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "log_level": "info",
      "log_file_path": "/var/log/calico/cni/cni.log",
      "datastore_type": "kubernetes",
      "nodename": "node1",
      "mtu": 0,
      "ipam": {"type": "calico-ipam"},
      "policy": {"type": "k8s"},
      "kubernetes": {"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"}
    },
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}
  ]
}`,
			"calico-kubeconfig": "apiVersion: v1\nkind: Config\n",
		},
		"flannel": {"10-flannel.conflist": `{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
`},
		"cilium, exclusive": {
			"05-cilium.conflist": `
{
  "cniVersion": "0.3.1",
  "name": "cilium",
  "plugins": [
    {
       "type": "cilium-cni",
       "enable-debug": false,
       "log-file": "/var/run/cilium/cilium-cni.log"
    }
  ]
}
`,
			"10-kindnet.conflist.cilium_bak": `{"cniVersion":"0.3.1","name":"kindnet","plugins":[{"type":"ptp"}]}`,
		},
		"aws": {"10-aws.conflist": `{
  "cniVersion": "0.4.0",
  "name": "aws-cni",
  "disableCheck": true,
  "plugins": [
    {
      "name": "aws-cni",
      "type": "aws-cni",
      "vethPrefix": "eni",
      "mtu": "9001",
      "podSGEnforcingMode": "strict",
      "pluginLogFile": "/var/log/aws-routed-eni/plugin.log",
      "pluginLogLevel": "DEBUG"
    },
    {
      "name": "egress-cni",
      "type": "egress-cni",
      "mtu": "9001",
      "enabled": "false",
      "randomizeSNAT": "prng",
      "nodeIP": "",
      "ipam": {
         "type": "host-local",
         "ranges": [[{"subnet": "fd00::ac:00/118"}]],
         "routes": [{"dst": "::/0"}],
         "dataDir": "/run/cni/v4pd/egress-v6-ipam"
      }
    },
    {
      "type": "portmap",
      "capabilities": {"portMappings": true},
      "snat": true
    }
  ]
}`},
		"containerd's bridge": {"10-containerd-net.conflist": `{
  "cniVersion": "1.0.0",
  "name": "containerd-net",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "ipMasq": true,
      "promiscMode": true,
      "ipam": {
        "type": "host-local",
        "ranges": [
          [{
            "subnet": "10.88.0.0/16"
          }],
          [{
            "subnet": "2001:4860:4860::/64"
          }]
        ],
        "routes": [
          { "dst": "0.0.0.0/0" },
          { "dst": "::/0" }
        ]
      }
    },
    {
      "type": "portmap",
      "capabilities": {"portMappings": true}
    }
  ]
}
`},
		"a single configuration": {"10-bridge.conf": `{
	"cniVersion": "0.3.1",
	"name": "bridge",
	"type": "bridge",
	"bridge": "cnio0",
	"isGateway": true,
	"ipam": {"type": "host-local", "subnet": "10.200.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}
}
`, "99-loopback.conf": `{"cniVersion": "0.3.1", "name": "lo", "type": "loopback"}`},
		"a single configuration, .json": {"net.json": `{"cniVersion":"1.0.0","name":"j","type":"bridge","mtu":1.50e3}`},
		"a single configuration beside a list of its name": {
			"10-x.conf":     `{"cniVersion":"0.4.0","name":"x","type":"bridge"}`,
			"10-x.conflist": `{"cniVersion":"0.4.0","name":"other","plugins":[{"type":"ptp"}]}`,
		},
		"multus": {
			"00-multus.conf":      `{"cniVersion":"0.3.1","name":"multus-cni-network","type":"multus","capabilities":{"portMappings":true},"kubeconfig":"/etc/cni/net.d/multus.d/multus.kubeconfig","delegates":[{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel"}]}]}`,
			"10-flannel.conflist": `{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel"}]}`,
		},
		"on one line":      {"a.conflist": `{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"bridge","big":12345678901234567890.0}],"plugin-less":[1,2]}`},
		"several versions": {"a.conflist": `{"cniVersion":"0.2.0","cniVersions":["0.4.0","1.1.0","9.9.9"],"name":"n","plugins":[ {"type":"bridge"} ]}`},
		"carriage returns": {"a.conflist": "{\r\n  \"cniVersion\": \"1.0.0\",\r\n  \"name\": \"n\",\r\n  \"plugins\": [\r\n    {\"type\": \"bridge\"}\r\n  ]\r\n}\r\n"},
	}
}
