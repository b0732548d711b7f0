"""Builds deploy/compose.yaml and runs it: answers, faults, restarts, shared memory; then everything is taken down.

    build -> up -> answer over both workers -> prefill worker killed -> back -> Redis restarted
      -> prefill worker told to end, comes back by its restart policy -> the same over shared memory -> down

Needs a running Docker with compose, and the wheels of `make wheels`. Each step says how long it took; the first
one that fails shows the services' logs and ends the test. Exit code 0 only if all passed and nothing is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from services.cli.demo_model import DEMO_NAME, ensure_demo_model
from services.cli.state import cache_root

DEPLOY = Path(__file__).resolve().parent.parent
SERVICES = {"redis", "controller", "router", "prefill", "decode"}
QUESTION = (
    "Please explain to a child, in a few simple words and short sentences, why the sky is blue during the day "
    "and why it turns red in the evening when the sun goes down."
)
ENGLISH = {"the", "is", "of", "and", "a", "in", "to", "because", "that", "it"}
REQUEST_TIMEOUT_S = 180.0
COMMAND_TIMEOUT_S = 900.0


class Failed(Exception):
    """A step did not show what it must."""


def expect(good: bool, message: str) -> None:
    if not good:
        raise Failed(message)


class Stack:
    """The compose project under test. `files` are given to every command, so that all see the same services."""

    def __init__(self, project: str, environ: dict[str, str], overlays: Sequence[str] = ()) -> None:
        self._environ = environ
        self._project = project
        files = [DEPLOY / name for name in ("compose.yaml", *overlays)]
        self._base = ["docker", "compose", "-p", project, *(part for file in files for part in ("-f", str(file)))]

    def compose(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        return self._run([*self._base, *arguments], timeout_s)

    def docker(self, *arguments: str) -> str:
        return self._run(["docker", *arguments], 120.0)

    def container(self, service: str) -> dict[str, Any]:
        """What `docker inspect` says of the service's one container."""
        found = self.compose("ps", "--all", "--quiet", service).split()
        expect(len(found) == 1, f"{service}: {len(found)} containers")
        inspected: dict[str, Any] = json.loads(self.docker("inspect", found[0]))[0]
        return inspected

    def health(self, service: str) -> str:
        state = self.container(service)["State"]
        return str(state.get("Health", {}).get("Status")) if state["Running"] else str(state["Status"])

    def workers(self) -> dict[str, dict[str, Any]]:
        """`nanodeploy status --json`, asked in the controller's container."""
        command = ["exec", "-T", "controller", "nanodeploy", "status", "--json", "--controller", "controller:7100"]
        try:
            status = json.loads(self.compose(*command))
        except subprocess.CalledProcessError as error:
            raise Failed(f"status ended with {error.returncode}: {error.stdout[-2000:]}") from None
        return {worker["worker_id"]: worker for worker in status["workers"]}

    def leftovers(self) -> list[str]:
        label = f"label=com.docker.compose.project={self._project}"
        kinds = (["ps", "--all"], ["network", "ls"], ["volume", "ls"])
        return [name for kind in kinds for name in self.docker(*kind, "--quiet", "--filter", label).split()]

    def _run(self, command: list[str], timeout_s: float) -> str:
        done = subprocess.run(
            command, env=self._environ, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            print(f"$ {' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}", flush=True)
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    prefill_worker: str
    transferred_tokens: int
    transport: str
    fallback: str


class Client:
    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def chat(self, question: str, max_tokens: int) -> Answer:
        """Greedy, and new to every prefix cache. Raises `Failed` for all but a whole answer."""
        body = {
            "model": DEMO_NAME,
            "messages": [{"role": "user", "content": f"({secrets.token_hex(4)}) {question}"}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        try:
            response = self._http.post("/v1/chat/completions", json=body, headers={"x-nanodeploy-timings": "1"})
        except httpx.HTTPError as error:
            raise Failed(f"no answer: {error!r}") from None
        expect(response.status_code == 200, f"answered {response.status_code}: {response.text[:1000]}")
        answer = response.json()
        stats = answer["nanodeploy"]["requests"][0]
        result = Answer(
            text=answer["choices"][0]["message"]["content"],
            prompt_tokens=answer["usage"]["prompt_tokens"],
            prefill_worker=stats["prefill_worker"],
            transferred_tokens=stats["transferred_tokens"],
            transport=stats["transport"],
            fallback=stats["fallback"],
        )
        expect(answer["usage"]["completion_tokens"] >= 1 and bool(result.text), f"an empty answer: {answer}")
        return result


@dataclass
class Load:
    """What the clients that ran during a fault have seen."""

    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def by_prefill(self) -> int:
        return sum(answer.transferred_tokens > 0 for answer in self.answers)


@contextlib.contextmanager
def load(client: Client, num_clients: int = 2) -> Iterator[Load]:
    """Clients that ask one long question after the other until the block ends; then all are waited for."""
    seen, done = Load(), threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                seen.answers.append(client.chat(" ".join([QUESTION] * 6), 8))
            except Failed as error:
                seen.failures.append(str(error))
                return

    threads = [threading.Thread(target=ask) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        for thread in threads:
            thread.join()


def wait_for(what: str, good: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not good():
        expect(time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.5)


def wait_for_answers(seen: Load, more: int) -> None:
    wanted = len(seen.answers) + more
    wait_for(f"{more} answers more", lambda: bool(seen.failures) or len(seen.answers) >= wanted, REQUEST_TIMEOUT_S)


def check_started(stack: Stack) -> str:
    for service in sorted(SERVICES):
        expect(stack.health(service) == "healthy", f"{service} is {stack.health(service)}")
        user = stack.compose("exec", "-T", service, "id", "-u").strip()
        expect(user != "0", f"{service} runs as root")
        expect(stack.container(service)["HostConfig"]["ReadonlyRootfs"], f"{service} can write its root filesystem")
    return "all healthy, none as root, root filesystems read-only"


def check_answer(stack: Stack, client: Client, transport: str) -> str:
    answer = client.chat(QUESTION, 48)
    words = [word.strip(".,!?'\"").lower() for word in answer.text.split()]
    expect(len(ENGLISH.intersection(words)) >= 4 and "sky" in words, f"not an English answer: {answer.text!r}")
    expect(answer.prefill_worker == "prefill-0" and not answer.fallback, f"the prefill worker took no part: {answer}")
    expect(answer.transferred_tokens > 0, f"no KV was moved: {answer}")
    expect(answer.transport == transport, f"moved by {answer.transport}, not {transport}")
    workers = stack.workers()
    expect({name: w["state"] for name, w in workers.items()} == {"prefill-0": "ready", "decode-0": "ready"}, "status")
    peer = workers["decode-0"]["peers"][0]
    expect(peer["transport"] == transport and peer["bytes_read"] > 0, f"status says {peer}")
    return f"{answer.prompt_tokens} prompt tokens over {transport}: {answer.text[:60]!r}..."


def kill_prefill(stack: Stack, client: Client) -> str:
    with load(client) as seen:
        wait_for("two answers by the prefill worker", lambda: bool(seen.failures) or seen.by_prefill() >= 2, 120.0)
        stack.compose("kill", "--signal", "KILL", "prefill")
        killed_at = len(seen.answers)
        wait_for_answers(seen, 6)
    expect(not seen.failures, f"requests failed: {seen.failures}")
    expect(stack.health("prefill") == "exited", f"prefill is {stack.health('prefill')}")
    alone = client.chat(QUESTION, 8)
    expect(alone.transferred_tokens == 0, f"KV came from a dead worker: {alone}")
    given_up = sorted(answer.fallback for answer in seen.answers[killed_at:] if answer.fallback)
    expect(bool(given_up), "no request was under way on the prefill worker when it was killed")
    counts = f"{killed_at} answers before, {len(seen.answers) - killed_at} after"
    return f"{counts}, none failed; computed anew: {', '.join(given_up)}"


def takes_part(client: Client) -> Callable[[], bool]:
    return lambda: client.chat(QUESTION, 4).transferred_tokens > 0


def start_prefill(stack: Stack, client: Client) -> str:
    stack.compose("start", "prefill")
    wait_for("the prefill worker takes part again", takes_part(client), 180.0)
    return "takes part again"


def restart_redis(stack: Stack, client: Client) -> str:
    with load(client) as seen:
        wait_for_answers(seen, 2)
        before = len(seen.answers)
        stack.compose("restart", "redis")
        wait_for_answers(seen, 4)
        wait_for("the controller is ready", lambda: stack.health("controller") == "healthy", 60.0)
    expect(not seen.failures, f"requests failed: {seen.failures}")
    wait_for("both workers are registered", lambda: set(stack.workers()) == {"prefill-0", "decode-0"}, 30.0)
    return f"{before} answers before, {len(seen.answers) - before} after, none failed; both workers registered anew"


def end_prefill(stack: Stack, client: Client) -> str:
    """SIGTERM from within, which Docker takes for an exit of its own: the restart policy must act."""
    epoch = stack.workers()["prefill-0"]["epoch"]
    started = stack.container("prefill")["RestartCount"]
    stack.compose("exec", "-T", "prefill", "python", "-c", "import os, signal; os.kill(1, signal.SIGTERM)")
    wait_for("the container is restarted", lambda: stack.container("prefill")["RestartCount"] > started, 60.0)
    wait_for("prefill is healthy", lambda: stack.health("prefill") == "healthy", 180.0)
    wait_for("the prefill worker takes part again", takes_part(client), 60.0)
    expect(stack.workers()["prefill-0"]["epoch"] != epoch, "the same epoch after a restart")
    return "drained, restarted by its policy, takes part again"


def up(stack: Stack) -> str:
    stack.compose("up", "--no-build", "--detach", "--wait", "--wait-timeout", "400")
    return check_started(stack)


def remake_workers(stack: Stack) -> str:
    """Other settings of the workers: the router must start again after them, with a fresh start period."""
    before = stack.container("router")["State"]["StartedAt"]
    result = up(stack)
    expect(stack.container("router")["State"]["StartedAt"] != before, "the router ran on without a decode worker")
    return result


def down(stack: Stack) -> str:
    stack.compose("down", "--volumes", "--remove-orphans")
    expect(not stack.leftovers(), f"left over: {stack.leftovers()}")
    return "nothing is left"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--skip-build", action="store_true", help="use the images that are there")
    arguments = parser.parse_args()
    port = free_port()
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")},
        "NANODEPLOY_MODELS": str(ensure_demo_model(cache_root(os.environ), print).parent),
        "NANODEPLOY_MODEL": DEMO_NAME,
        "NANODEPLOY_LISTEN": f"127.0.0.1:{port}",
        "NANODEPLOY_TAG": "test",
    }
    project = f"nanodeploy-test-{os.getpid()}"
    stack = Stack(project, environ)
    shared = Stack(project, environ, ["compose.shared-memory.yaml"])
    client = Client(f"http://127.0.0.1:{port}")
    steps: list[tuple[str, Callable[[], str]]] = [
        ("up", lambda: up(stack)),
        ("an answer", lambda: check_answer(stack, client, "ucx/tcp")),
        ("prefill killed", lambda: kill_prefill(stack, client)),
        ("prefill started", lambda: start_prefill(stack, client)),
        ("redis restarted", lambda: restart_redis(stack, client)),
        ("prefill ended", lambda: end_prefill(stack, client)),
        ("up, shared memory", lambda: remake_workers(shared)),
        ("an answer", lambda: check_answer(shared, client, "ucx/posix")),
    ]
    if not arguments.skip_build:
        steps.insert(0, ("build", lambda: f"{len(stack.compose('build', timeout_s=3600.0).splitlines())} lines"))
    started = time.monotonic()
    passed = run_steps(steps)
    if not passed:
        show_logs(stack)
    passed = run_steps([("down", lambda: down(stack))]) and passed
    print(f"{'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True)
    return 0 if passed else 1


def run_steps(steps: Sequence[tuple[str, Callable[[], str]]]) -> bool:
    """One after the other up to the first that fails. Ctrl-C counts as a failure, so that `down` follows."""
    for name, step in steps:
        began = time.monotonic()
        try:
            result = step()
        except (Failed, subprocess.SubprocessError, KeyboardInterrupt) as error:
            print(f"FAILED {name:18} {time.monotonic() - began:6.1f} s  {error or type(error).__name__}", flush=True)
            return False
        print(f"ok     {name:18} {time.monotonic() - began:6.1f} s  {result}", flush=True)
    return True


def show_logs(stack: Stack) -> None:
    with contextlib.suppress(subprocess.SubprocessError):
        print(stack.compose("ps", "--all"))
        print(stack.compose("logs", "--no-color", "--tail", "25"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
