"""What a WebSocket client does: websocket_client.py URL."""
import asyncio
import sys

import websockets

url = sys.argv[1]


async def main():
    for compression in "deflate", None:
        async with websockets.connect(url, max_size=None, compression=compression, subprotocols=["chat"]) as ws:
            print("subprotocol", ws.subprotocol, compression)
            for i in range(2000):
                await ws.send(f"message {i} \u2603" if i % 2 else b"%d" % i)
            echoed = [await ws.recv() for _ in range(2000)]
            print("echoed", len(echoed), all(
                e == (f"message {i} \u2603" if i % 2 else b"%d" % i) for i, e in enumerate(echoed)))
            large = bytes(range(250)) * 32000
            await ws.send(large)
            print("large", len(large), await ws.recv() == large)
            await ws.send(large[i * 80000:(i + 1) * 80000] for i in range(100))  # fragments
            print("fragments", await ws.recv() == large)
            await asyncio.wait_for(await ws.ping(b"are you there"), 10)
            print("pong")
            await asyncio.sleep(1.5)  # nothing passes
            await ws.send("still there")
            print(await ws.recv())
            await ws.send("bye")
            try:
                await ws.recv()
            except websockets.ConnectionClosed as e:
                print("closed", e.rcvd.code, e.rcvd.reason)

    async def one(i):
        async with websockets.connect(url) as ws:
            await ws.send(f"client {i}")
            return await ws.recv() == f"client {i}"
    clients = await asyncio.gather(*[one(i) for i in range(100)])
    print("clients", sum(clients))

asyncio.run(main())
