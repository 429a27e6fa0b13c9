"""What a gRPC client does: grpc_client.py ADDRESS."""
import concurrent.futures
import hashlib
import sys

import grpc

options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
           ("grpc.use_local_subchannel_pool", 1)]
channels = [grpc.insecure_channel(sys.argv[1], options=options) for _ in range(5)]


def call(kind, name, channel=channels[0]):
    return getattr(channel, kind)(f"/test.Bytes/{name}")


# Many calls at a time on a few connections.
with concurrent.futures.ThreadPoolExecutor(50) as pool:
    def one(i):
        return call("unary_unary", "Unary", channels[i % 5])(b"x" * i, timeout=30) == hashlib.sha256(b"x" * i).digest()
    results = list(pool.map(one, range(2000)))
    print("unary", len(results), all(results))

chunks = list(call("unary_stream", "Download")(b"300 60000", timeout=30))
print("download", len(chunks), all(c == bytes([i % 256]) * 60000 for i, c in enumerate(chunks)))
print("upload", call("stream_unary", "Upload")((bytes([i % 256]) * 50000 for i in range(400)), timeout=30).decode())
large = bytes(range(250)) * 80000
print("large", len(large), call("unary_unary", "Unary")(large, timeout=30) == hashlib.sha256(large).digest())

# Each message waits for the answer to the one before.
answers = call("stream_stream", "Duplex")
last, count = [], 0


def ping():
    for i in range(2000):
        while len(last) < i:
            pass
        yield b"message %d" % i


for a in answers(ping(), timeout=60):
    count += a == (b"message %d" % len(last))[::-1]
    last.append(a)
print("duplex", count)

try:
    call("unary_unary", "Unary")(b"missing", timeout=30)
except grpc.RpcError as e:
    print(e.code().name, e.details())
    print("trailer", sorted((m.key, m.value) for m in e.trailing_metadata() if m.key.startswith("x-")))
try:
    call("unary_unary", "Unary")(b"slow", timeout=0.3)
except grpc.RpcError as e:
    print(e.code().name)
try:
    call("unary_unary", "None")(b"", timeout=30)
except grpc.RpcError as e:
    print(e.code().name, e.details())

response, done = call("unary_unary", "Unary").with_call(b"ok", timeout=30)
print("initial", sorted((m.key, m.value) for m in done.initial_metadata() if m.key == "x-initial"), done.code().name)
print("metadata", call("unary_unary", "Metadata")(b"", timeout=30, metadata=(
    ("x-text", "a b,c"), ("x-many", "1"), ("x-many", "2"), ("x-raw-bin", bytes(range(256))))).decode())

watching = call("unary_stream", "Watch")(b"", timeout=30)
first = next(watching)
watching.cancel()
print("cancelled", watching.cancelled(), first.decode())
