"""Many clients of event streams at once, in one small process: `sink.py ENDPOINT MODEL STREAMS EVENTS` prints JSON.

ENDPOINT is `unix:PATH` or `HOST:PORT`. An event's latency is the time from its writing (upstream.py) to our having read it.
"""

import array
import json
import re
import resource
import select
import socket
import sys
import time

_LIMIT_S = 120.0
_TIME = re.compile(rb'"t":(\d+)\}')
_WARM_UP = 0.2
"""The first part of the events is not counted: connections are made meanwhile."""


def connect(endpoint: str) -> socket.socket:
    if endpoint.startswith("unix:"):
        found = socket.socket(socket.AF_UNIX)
        found.connect(endpoint.removeprefix("unix:"))
        return found
    host, _, port = endpoint.partition(":")
    return socket.create_connection((host, int(port)))


def main() -> None:
    endpoint, model, streams, events = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, streams + 100)), hard))
    body = json.dumps({"model": model, "stream": True, "max_tokens": events, "messages": []}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    poll, clients = select.epoll(), {}
    for _ in range(streams):
        client = connect(endpoint)
        client.sendall(head.encode() + body)
        clients[client.fileno()] = client
        poll.register(client, select.EPOLLIN)
    seen, latencies, deadline = 0, array.array("d"), time.monotonic() + _LIMIT_S
    while clients and time.monotonic() < deadline:
        for number, _ in poll.poll(1.0):
            data = clients[number].recv(65536)
            now = time.monotonic_ns()
            for told in _TIME.findall(data):
                seen += 1
                if seen > streams * events * _WARM_UP:
                    latencies.append((now - int(told)) / 1e6)
            if not data or data.endswith(b"0\r\n\r\n"):
                clients.pop(number).close()
    ordered = sorted(latencies)
    rank = {name: ordered[int(len(ordered) * share)] if ordered else None for name, share in (("p50", 0.5), ("p99", 0.99))}
    print(json.dumps({"events": seen, "expected": streams * events, **rank}))


main()
