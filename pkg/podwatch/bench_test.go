package podwatch

import (
	"fmt"
	"net/netip"
	"testing"
)

// BenchmarkOneOfMany changes one service, or one pod, of many: the time must
// not depend on how many there are.
func BenchmarkOneOfMany(b *testing.B) {
	for _, n := range []int{50, 500, 5000} {
		store := NewStore(StoreOptions{})
		files, err := NewFiles(FilesOptions{Dir: b.TempDir(), Store: store})
		if err != nil {
			b.Fatal(err)
		}
		set := func(name, text string) {
			files.commit(map[string]*file{name: {docs: files.parser.parse(name, []byte(text))}})
		}
		for i := range n {
			name := fmt.Sprintf("s%d", i)
			set(name+".yaml", service(name, 80)+pod(name+"-a", name, "status: {podIP: 10.1.0.1}")+pod(name+"-b", name, "status: {podIP: 10.1.0.2}"))
		}
		b.Run(fmt.Sprintf("service/of=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				set("s7.yaml", service("s7", 80+i%2)+pod("s7-a", "s7", "status: {podIP: 10.1.0.1}"))
			}
		})
		b.Run(fmt.Sprintf("pod/of=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				files.SetPodAddrs("shop", "s9-c", []netip.Addr{addr("10.1.0.3")})
				set("s9-c.yaml", pod("s9-c", "s9", ""))
				files.SetPodAddrs("shop", "s9-c", []netip.Addr{netip.AddrFrom4([4]byte{10, 2, 0, byte(i)})})
			}
		})
		if got := len(store.Services()); got != n || len(files.Problems()) > 0 {
			b.Fatalf("%d services, want %d; problems %v", got, n, files.Problems())
		}
	}
}

// BenchmarkParse reads one file of 5000 services, the most that a change of one
// file can cost.
func BenchmarkParse(b *testing.B) {
	var text []byte
	for i := range 5000 {
		text = append(text, service(fmt.Sprintf("s%d", i), 80)...)
	}
	p := newParser()
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if docs := p.parse("all.yaml", text); len(docs) != 5000 {
			b.Fatalf("%d documents", len(docs))
		}
	}
}
