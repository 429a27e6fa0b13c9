"""What must hold of iperf3's result, which is read from standard input."""
import json
import sys

result = json.load(sys.stdin)
if "error" in result:
    sys.exit(result["error"])
end = result["end"]
sent, received = end["sum_sent"]["bytes"], end["sum_received"]["bytes"]
# What is on its way when the sender stops is not counted.
print(f"{sys.argv[1]}:", f"{sent} sent," if "-t" not in sys.argv[1] else "", len(end["streams"]), "streams, received",
      "most" if 0.5 * sent < received <= sent else f"{received} of {sent}")
