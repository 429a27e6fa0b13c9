"""A gRPC server of bytes: grpc_server.py PORT."""
import concurrent.futures
import hashlib
import sys
import time

import grpc


def unary(request, context):
    if request == b"missing":
        context.set_trailing_metadata((("x-trailer", "end"), ("x-bin-bin", bytes(range(256)))))
        context.abort(grpc.StatusCode.NOT_FOUND, "nothing here")
    if request == b"slow":
        time.sleep(2)
    context.send_initial_metadata((("x-initial", "begin"),))
    return hashlib.sha256(request).digest()


def download(request, context):
    count, size = map(int, request.split())
    for i in range(count):
        yield bytes([i % 256]) * size


def upload(requests, context):
    sum, size = hashlib.sha256(), 0
    for r in requests:
        sum.update(r)
        size += len(r)
    return f"{size} {sum.hexdigest()}".encode()


def duplex(requests, context):
    for r in requests:
        yield r[::-1]


def watch(request, context):
    while context.is_active():
        yield b"still here"
        time.sleep(0.05)


def metadata(request, context):
    return repr(sorted(m for m in context.invocation_metadata() if m.key.startswith("x-") and m.key not in (
        "x-request-id", "x-forwarded-proto", "x-envoy-attempt-count"))).encode()


server = grpc.server(concurrent.futures.ThreadPoolExecutor(64), options=[
    ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)])
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Bytes", {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Download": grpc.unary_stream_rpc_method_handler(download),
    "Upload": grpc.stream_unary_rpc_method_handler(upload),
    "Duplex": grpc.stream_stream_rpc_method_handler(duplex),
    "Watch": grpc.unary_stream_rpc_method_handler(watch),
    "Metadata": grpc.unary_unary_rpc_method_handler(metadata),
}),))
if not server.add_insecure_port(f"[::]:{sys.argv[1]}"):
    sys.exit("port is taken")
server.start()
server.wait_for_termination()
