"""A W&B server on this machine (openwandb), with a record of all that clients send it.

python wandb_server.py <port> <record>; the record has a line of JSON per request with a body.
"""

import json
import sys

import uvicorn
from openwandb.server import app


async def recorded(scope, receive, send):
    body = bytearray()

    async def heard():
        message = await receive()
        body.extend(message.get("body", b""))
        if body.startswith(b"{") and not message.get("more_body"):
            with open(sys.argv[2], "a") as record:
                print(json.dumps({"path": scope["path"], "sent": json.loads(body)}), file=record)
        return message

    await app(scope, heard if scope["type"] == "http" else receive, send)


if __name__ == "__main__":
    uvicorn.run(recorded, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
