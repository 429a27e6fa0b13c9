"""An echo over WebSocket: websocket_server.py PORT."""
import asyncio
import sys

import websockets


async def echo(ws):
    async for message in ws:
        if message == "bye":
            await ws.close(4001, "bye")
            return
        await ws.send(message)


async def main():
    async with websockets.serve(echo, ["0.0.0.0", "::"], int(sys.argv[1]), subprotocols=["chat"], max_size=None,
                                ping_interval=None, backlog=1000):
        await asyncio.Future()

asyncio.run(main())
