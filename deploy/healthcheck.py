"""Asks a service of this container whether it is ready: `healthcheck.py PORT`; exit code 0 if it is.

Runs every few seconds in every container, so it imports little: `python -IS` starts it in 20 ms.
"""

import socket
import sys

TIMEOUT_S = 4.0


def main() -> int:
    try:
        with socket.create_connection(("127.0.0.1", int(sys.argv[1])), TIMEOUT_S) as connection:
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            with connection.makefile("rb") as answer:
                head, _, body = answer.read(64 * 1024).partition(b"\r\n\r\n")
    except OSError as error:
        print(error)
        return 1
    print(body.decode(errors="replace")[:1000])
    return 0 if head.split()[1:2] == [b"200"] else 1


if __name__ == "__main__":
    sys.exit(main())
