"""What a NATS client does: nats_client.py URL."""
import asyncio
import hashlib
import sys

import nats
from nats.js.api import RetentionPolicy

url = sys.argv[1]


async def main():
    nc = await nats.connect(url)
    other = await nats.connect(url)
    print("max payload", nc.max_payload)

    # Everything arrives, once and in order.
    got, done = [], asyncio.Event()

    async def collect(msg):
        got.append(int(msg.data))
        if len(got) == 20000:
            done.set()
    await other.subscribe("numbers", cb=collect)
    await other.flush()
    for i in range(20000):
        await nc.publish("numbers", b"%d" % i)
    await nc.flush()
    await asyncio.wait_for(done.wait(), 90)
    print("received", len(got), "in order", got == list(range(20000)))

    # Requests are answered by one of a queue group each, many at a time.
    served = [0, 0]

    def responder(i):
        async def respond(msg):
            served[i] += 1
            await msg.respond(hashlib.sha256(msg.data).digest())
        return respond
    for i in range(2):
        await other.subscribe("sum", queue="workers", cb=responder(i))
    await other.flush()
    replies = await asyncio.gather(*[nc.request("sum", b"x" * i, timeout=90) for i in range(500)])
    good = all(r.data == hashlib.sha256(b"x" * i).digest() for i, r in enumerate(replies))
    print("replies", len(replies), "right", good, "each once", sum(served) == 500)

    large = bytes(range(256)) * 3906 + b"e" * 64
    sub = await other.subscribe("large")
    await other.flush()
    for _ in range(20):
        await nc.publish("large", large)
    received = [await sub.next_msg(timeout=90) for _ in range(20)]
    print("large", len(large), all(m.data == large for m in received))

    # A stream that is kept by the server and read later.
    js = nc.jetstream()
    await js.add_stream(name="kept", subjects=["kept.>"], retention=RetentionPolicy.LIMITS)
    for start in range(0, 5000, 500):
        acks = await asyncio.gather(*[js.publish(f"kept.{i}", b"%d" % i, timeout=90) for i in range(start, start + 500)])
    pull = await other.jetstream().pull_subscribe("kept.>", "reader")
    read = []
    while len(read) < 5000:
        for m in await pull.fetch(500, timeout=90):
            read.append(int(m.data))
            await m.ack()
    print("jetstream", acks[-1].seq, len(read), hashlib.sha256(str(sorted(read)).encode()).hexdigest())
    kv = await js.create_key_value(bucket="config")
    await kv.put("a", b"1")
    await kv.put("a", b"2")
    print("key", (await kv.get("a")).value, (await kv.get("a")).revision)

    # A client that is silent for a while, and one that has nobody to ask.
    quiet = await other.subscribe("quiet")
    await other.flush()
    asyncio.get_running_loop().call_later(1.5, lambda: asyncio.ensure_future(nc.publish("quiet", b"1")))
    print("slow", (await quiet.next_msg(timeout=90)).data.decode())
    try:
        await nc.request("nobody", b"", timeout=90)
    except nats.errors.NoRespondersError as e:
        print("nobody:", e)

    many = await asyncio.gather(*[nats.connect(url) for _ in range(50)])
    await asyncio.gather(*[c.flush() for c in many])
    print("connections", len(many), all(c.is_connected for c in many))
    for c in [nc, other, *many]:
        await c.drain()

asyncio.run(main())
