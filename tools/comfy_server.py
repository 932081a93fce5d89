"""A real ComfyUI server on 127.0.0.1 with the pack installed, and a client that queues prompts."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

import package

START_SECONDS = 300  # generous: a busy machine takes five times the usual 10 s
PROMPT_SECONDS = 900


@dataclass
class PromptResult:
    """What one prompt did: outputs by node id, events of the pack, and seconds by node id."""

    outputs: dict[str, dict] = field(default_factory=dict)
    reports: list[dict] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class ComfyServer:
    """A ComfyUI server with a copy of the pack below `base`, as a context manager."""

    def __init__(self, tree: Path, base: Path) -> None:
        self.tree, self.base = tree, base
        self.log_path = base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        package.copy(self.base / "custom_nodes" / "ComfyUI-RoPeSLR")
        shim = Path(__file__).parent / "cpu_shim"
        command = [
            sys.executable,
            str(self.tree / "main.py"),
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--disable-auto-launch",
            "--database-url",
            "sqlite:///:memory:",
            "--use-pytorch-cross-attention",
        ]
        if os.environ.get("ROPESLR_FRONTEND"):  # another than the one that is installed
            command += ["--front-end-root", os.environ["ROPESLR_FRONTEND"]]
        with open(self.log_path, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.tree,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(shim), "PYTHONUNBUFFERED": "1"},
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> dict:
        """GET a JSON answer."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def log(self) -> str:
        """Everything the server has printed."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def post_prompt(self, prompt: dict, client_id: str) -> tuple[int, dict]:
        """POST /prompt: -> HTTP status and answer, also when the prompt is refused."""
        body = json.dumps({"prompt": prompt, "client_id": client_id}).encode()
        request = urllib.request.Request(
            self.url + "/prompt", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def run(self, prompt: dict) -> PromptResult:
        """Queue a prompt, follow it to its end.

        Raises RuntimeError with the server's words when it fails.
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt), PROMPT_SECONDS))

    async def _run(self, prompt: dict) -> PromptResult:
        client_id = uuid.uuid4().hex
        result = PromptResult()
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(
                f"{self.url}/ws?clientId={client_id}", max_msg_size=0
            ) as socket_:
                status, answer = await asyncio.to_thread(self.post_prompt, prompt, client_id)
                if status != 200:
                    raise RuntimeError(f"the server refused the prompt: {json.dumps(answer)}")
                await self._follow(socket_, answer["prompt_id"], result)
        entry = self.get(f"/history/{answer['prompt_id']}")[answer["prompt_id"]]
        result.outputs = entry["outputs"]
        return result

    async def _follow(
        self, socket_: aiohttp.ClientWebSocketResponse[bool], prompt_id: str, result: PromptResult
    ) -> None:
        node, since = None, time.perf_counter()
        async for message in socket_:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # previews come as binary messages
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if kind == "ropeslr.report":
                result.reports.append(data)
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "executing":
                now = time.perf_counter()
                if node is not None:
                    result.seconds[node] = now - since
                node, since = data["node"], now
                if node is None:  # sent when the history is written, after execution_success
                    return
            if kind == "execution_error":
                raise RuntimeError(
                    f"{data['node_type']}: "
                    f"{data['exception_message']}\n{''.join(data['traceback'])}"
                )
        raise RuntimeError(f"the server closed the connection; its log ends:\n{self.log()[-2000:]}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"ComfyUI ended while starting; its log ends:\n{self.log()[-3000:]}"
                )
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(
            f"ComfyUI did not answer within {START_SECONDS} s; its log ends:\n{self.log()[-3000:]}"
        )
