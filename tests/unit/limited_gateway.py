"""A gateway in a process of its own that may have few descriptors: `python limited_gateway.py KIND DESCRIPTORS ENGINE-SOCKET`.

KIND: `http`, `workers` (one worker relays), `tunnel` (a raw port). It says where it listens, goes on until its standard input
ends, and then says what it has done to engines.
"""

import asyncio
import json
import logging
import resource
import socket
import sys

import uvloop
from relay_gateway import gateway

from mmd.gateway.tunnel_server import TunnelServer


async def main(kind: str, path: str) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    async with gateway({"m": f"unix:{path}"}, workers=int(kind == "workers")) as running:
        port, server = running.port, None
        if kind == "tunnel":
            listening = socket.create_server(("127.0.0.1", 0))
            server = TunnelServer("mmd-port-m", running.dispatcher, listening, "m")
            await server.start()
            port = listening.getsockname()[1]
        pids = [] if running.staff is None else running.staff.pids
        print(json.dumps({"port": port, "workers": pids}), flush=True)
        loop.add_reader(0, over.set)
        await over.wait()
        print(json.dumps({"actions": [str(each) for each in running.lifecycle.actions]}), flush=True)
        if server is not None:
            await server.stop_accepting()
            await server.drain(0)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
    uvloop.run(main(sys.argv[1], sys.argv[3]))
