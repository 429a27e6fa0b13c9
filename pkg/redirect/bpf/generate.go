package bpf

// The object is little endian only: amd64 and arm64 are what Kubernetes nodes
// run. -mcpu=v2 is what every kernel since 4.14 verifies; nothing needs more.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -cflags "-O2 -g -Wall -Werror -mcpu=v2" -target bpfel -go-package bpf -type sl_reason -type sl_direction redirect ../../../bpf/redirect.c

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -cflags "-O2 -g -Wall -Werror -mcpu=v2" -target bpfel -go-package bpf -output-suffix _test -type sl_question verdict ../../../bpf/test/verdict.c

// What finds listeners needs the kernel's BTF and is loaded where tc programs may not do it.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -cflags "-O2 -g -Wall -Werror -mcpu=v2" -target bpfel -go-package bpf listening ../../../bpf/listening.c

// Acceleration is an object of its own: redirection works on kernels that do not load it.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -cflags "-O2 -g -Wall -Werror -mcpu=v2" -target bpfel -go-package bpf -type sl_accel_event accel ../../../bpf/accel.c
