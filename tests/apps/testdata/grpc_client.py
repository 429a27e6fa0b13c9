"""What a gRPC client does: grpc_client.py ADDRESS."""
import concurrent.futures
import hashlib
import queue
import sys

import grpc

options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
           ("grpc.use_local_subchannel_pool", 1)]
channels = [grpc.insecure_channel(sys.argv[1], options=options) for _ in range(5)]
for c in channels:
    # 1.51 was seen to give up a connection with "No such file or directory", which is no
    # error of connect: it is to try again.
    grpc.channel_ready_future(c).result(timeout=120)


def call(kind, name, channel=channels[0]):
    return getattr(channel, kind)(f"/test.Bytes/{name}")


# Many calls at a time on a few connections.
with concurrent.futures.ThreadPoolExecutor(50) as pool:
    def one(i):
        return call("unary_unary", "Unary", channels[i % 5])(b"x" * i, timeout=120) == hashlib.sha256(b"x" * i).digest()
    results = list(pool.map(one, range(2000)))
    print("unary", len(results), all(results))

chunks = list(call("unary_stream", "Download")(b"300 60000", timeout=120))
print("download", len(chunks), all(c == bytes([i % 256]) * 60000 for i, c in enumerate(chunks)))
print("upload", call("stream_unary", "Upload")((bytes([i % 256]) * 50000 for i in range(400)), timeout=120).decode())
large = bytes(range(250)) * 80000
print("large", len(large), call("unary_unary", "Unary")(large, timeout=120) == hashlib.sha256(large).digest())

# Each message waits for the answer to the one before.
answered, count = queue.Queue(), 0


def ping():
    for i in range(2000):
        yield b"message %d" % i
        answered.get(timeout=120)


for answer in call("stream_stream", "Duplex")(ping(), timeout=120):
    count += answer == (b"message %d" % count)[::-1]
    answered.put(answer)
print("duplex", count)

try:
    call("unary_unary", "Unary")(b"missing", timeout=120)
except grpc.RpcError as e:
    print(e.code().name, e.details())
    print("trailer", sorted((m.key, m.value) for m in e.trailing_metadata() if m.key.startswith("x-")))
try:
    call("unary_unary", "Unary")(b"slow", timeout=0.3)
except grpc.RpcError as e:
    print(e.code().name)
try:
    call("unary_unary", "None")(b"", timeout=120)
except grpc.RpcError as e:
    print(e.code().name, e.details())

response, done = call("unary_unary", "Unary").with_call(b"ok", timeout=120)
print("initial", sorted((m.key, m.value) for m in done.initial_metadata() if m.key == "x-initial"), done.code().name)
print("metadata", call("unary_unary", "Metadata")(b"", timeout=120, metadata=(
    ("x-text", "a b,c"), ("x-many", "1"), ("x-many", "2"), ("x-raw-bin", bytes(range(256))))).decode())

watching = call("unary_stream", "Watch")(b"", timeout=120)
first = next(watching)
watching.cancel()
print("cancelled", watching.cancelled(), first.decode())
