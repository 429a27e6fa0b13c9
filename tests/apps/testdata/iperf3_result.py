"""What must hold of iperf3's result, which is read from standard input."""
import json
import sys

arguments = sys.argv[1].split()
result = json.load(sys.stdin)
if "error" in result:
    sys.exit(result["error"])
end = result["end"]
sent, received = end["sum_sent"]["bytes"], end["sum_received"]["bytes"]
asked = int(arguments[1][:-1]) << 20 if arguments[0] == "-n" else 1
# It sends whole blocks on all streams; what is on its way when the sender stops
# is not counted as received. On its way is what buffers of sockets and proxies
# hold, for each stream some 20 MB.
streams = len(end["streams"])
least = 0.5 * sent if streams == 1 else 1
print(f"{sys.argv[1]}:", "all sent," if sent >= asked else f"{sent} sent,", streams, "streams, received",
      ("most" if streams == 1 else "some") if least <= received <= sent else f"{received} of {sent}")
