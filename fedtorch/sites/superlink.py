"""Bytes over a Flower SuperLink: the one file that knows flwr, beside the privacy mod.

Flower's own programs start a process for each message and run what a job brings. Here both ends are
processes that stay: the server takes the place of the ServerApp, a site that of the ClientApp, as
``--isolation process`` lets them, and nothing in the job's bundle is ever looked at. What travels is one
array of bytes a message, which Flower cuts into parts of 5 MiB, and a few words beside it.

Flower's own Grid reaches the same calls only in a process that its SuperExec has started; the calls are
those of flwr 1.41 and 1.42, and an installation that has others is refused by name (``sites.flower``).
"""

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import fab_to_proto, message_from_proto, message_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.message_pb2 import Message as Header
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from fedtorch.sites.rpc import Refused, Unreachable

RECORD = "fedtorch"
LIFE = 12 * 3600.0
"""Seconds that Flower keeps a message for a node, or its reply."""
SMALL = 1 << 18
"""Bytes that go with the words of a message, and not as an array of their own."""
SERVER = 1
"""The number of the SuperLink itself among its nodes."""
BUNDLE = f"""[project]
name = "fedtorch"
version = "1.0.0"
description = "Names an installed fedtorch and carries no code."
license = {{ text = "Apache-2.0" }}
dependencies = []

[tool.flwr.app]
publisher = "fedtorch"

[tool.flwr.app.components]
serverapp = "{__name__}:server_app"
clientapp = "{__name__}:client_app"
""".encode()


@dataclass(frozen=True)
class Door:
    """Where a SuperLink or a SuperNode takes calls, and how to get in."""

    address: str
    authority: bytes | None
    """Whose certificate it must show, PEM; none: no TLS."""
    secret: bytes | None
    """The SuperExec secret that it was started with."""


@dataclass(frozen=True)
class Parcel:
    """A message that came, or why none will: its words, its bytes, and the node that it is from."""

    header: dict[str, Any]
    body: bytes
    node: int
    error: str = ""


class Runtime:
    """A door's tasks: one at a time is this process's, and the messages that it may exchange."""

    def __init__(self, door: Door) -> None:
        self.door, self.token, self.run, self.node = door, "", 0, 0
        method = {"/flwr.proto.Runtime/AcquireTask"}
        signed = [
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=method)
            for secret in [door.secret]
            if secret
        ]
        self.client = _client(RuntimeHttpClient, door, self, *signed)

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Show the task's token with every call: what flwr asks of an interceptor."""
        if self.token:
            return RuntimeTokenHttpInterceptor(self.token).intercept(context, call_next)
        return call_next(context)

    def acquire(self, kind: str) -> int | None:
        """Take the oldest task that waits for somebody; its number. Raises Unreachable or Refused."""
        with told(self.door):
            self.token = ""
            answer = self.client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
        if not answer.token:
            return None
        self.token, self.run = str(answer.token), int(answer.task.run_id)
        return int(answer.task.task_id)

    def begin(self) -> int:
        """Say that its work begins; the node that it is for. Raises Unreachable or Refused."""
        with told(self.door):
            return int(self.client.PullTaskInput(PullTaskInputRequest()).context.node_id)

    def push(self, message: Message) -> str:
        """Send it; its number at Flower. Raises Unreachable or Refused."""
        with told(self.door), no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            header = message_to_proto(remove_content_from_message(message))
            answer = self.client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[header], message_object_trees=[get_object_tree(message)]
                )
            )
            send = make_push_object_fn_protobuf(
                self.client.PushObject,
                Node(node_id=self.node),
                run_id=self.run,
                session_id=answer.session_id,
            )
            due = {*answer.objects_to_push}
            push_objects(get_all_nested_objects(message), send, object_ids_to_push=due)
        (number,) = answer.message_ids or [""]
        if not number:
            raise Unreachable("Flower did not take a message")
        return str(number)

    def pull(self, numbers: Sequence[str] = ()) -> list[tuple[Header, Callable[[], Parcel]]]:
        """Messages that have come, to a server replies to these, each to be fetched by a call.

        Raises Unreachable or Refused, and so does each call.
        """
        with told(self.door):
            answer = self.client.PullMessages(PullAppMessagesRequest(message_ids=numbers))
        node = Node(node_id=self.node)
        get = make_pull_object_fn_protobuf(self.client.PullObject, node, self.run)
        thanks = make_confirm_message_received_fn_protobuf(
            self.client.ConfirmMessageReceived, node, self.run
        )
        # a message may be there a moment before all of it is
        patience: dict[str, Any] = {"initial_backoff": 0.05, "backoff_cap": 1.0, "max_time": 300.0}

        def fetch(tree: Any) -> Parcel:
            with told(self.door):
                return _parcel(pull_and_inflate_object_from_tree(tree, get, thanks, **patience))

        found = zip(answer.messages_list, answer.message_object_trees, strict=True)
        return [(header, partial(fetch, tree)) for header, tree in found]

    def finish(self, why: str = "") -> None:
        """Give the task back: done, or failed and why. Raises Unreachable or Refused."""
        ended = "failed" if why else "completed"
        with told(self.door):
            self.client.PushTaskOutput(PushTaskOutputRequest(sub_status=ended, details=why))

    def close(self) -> None:
        """Hang up."""
        self.client.close()


class Grid:
    """The server's end: one run at a SuperLink."""

    def __init__(self, door: Door, seconds: float = 30.0) -> None:
        """Begin a run and take its ServerApp's place; raises Unreachable or Refused."""
        run = _begun(door)
        self.runtime = runtime = Runtime(door)
        end = time.monotonic() + seconds
        while (number := runtime.acquire(TaskType.SERVER_APP)) is None or runtime.run != run:
            if number is not None:
                runtime.finish("its place was taken by fedtorch, which serves this SuperLink")
            if time.monotonic() > end:
                runtime.close()
                raise Refused(
                    f"the SuperLink at {door.address} gives its run to nobody: it must be started with "
                    "--isolation process, and no flower-superexec beside this server"
                )
            time.sleep(0.1)
        self.number, runtime.node = number, SERVER
        runtime.begin()

    def nodes(self) -> list[int]:
        """Nodes that are online now; raises Unreachable or Refused."""
        with told(self.runtime.door):
            return [int(n.node_id) for n in self.runtime.client.GetNodes(GetNodesRequest()).nodes]

    def alive(self) -> None:
        """Say that this server lives; raises Unreachable, or Refused where the run was ended."""
        with told(self.runtime.door):
            answer = self.runtime.client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        if not answer.success:
            raise Refused("the run was ended at the SuperLink")

    def send(self, node: int, header: dict[str, Any], body: bytes) -> str:
        """A message for a node; its number. Raises Unreachable or Refused."""
        about = Metadata(
            run_id=self.runtime.run,
            message_id="",
            src_node_id=SERVER,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=LIFE,
            message_type="train",
            src_task_id=self.number,
        )
        return self.runtime.push(make_message(about, content=_packed(header, body)))

    def replies(self, numbers: Sequence[str]) -> list[tuple[str, Callable[[], Parcel]]]:
        """Replies to these messages, to be fetched by a call each; all may raise Unreachable or Refused."""
        found = self.runtime.pull(numbers) if numbers else []
        return [(str(header.metadata.reply_to_message_id), get) for header, get in found]

    def close(self) -> None:
        """End the run; raises Unreachable or Refused."""
        try:
            self.runtime.finish()
        finally:
            self.runtime.close()


class Behind:
    """A site's end: the messages that the SuperNode beside it has for its ClientApp, one at a time."""

    def __init__(self, door: Door) -> None:
        self.runtime = Runtime(door)
        self.header = Header()
        """Of the message that is to be answered."""

    def take(self) -> Parcel | None:
        """The next message, if there is one; raises Unreachable or Refused."""
        if self.runtime.acquire(TaskType.CLIENT_APP) is None:
            return None
        self.runtime.node = self.runtime.begin()
        found = self.runtime.pull()
        if len(found) != 1:
            raise Unreachable("the SuperNode has a task without a message")
        ((self.header, get),) = found
        return get()

    def reply(self, header: dict[str, Any], body: bytes) -> None:
        """Answer the message; raises Unreachable or Refused."""
        asked = message_from_proto(self.header)
        self.runtime.push(Message(_packed(header, body), reply_to=asked))
        self.runtime.finish()

    def kept(self) -> dict[str, Any]:
        """What another process of this site needs to answer it, as plain values."""
        told = {"token": self.runtime.token, "run": self.runtime.run, "node": self.runtime.node}
        return told | {"header": self.header.SerializeToString().hex()}

    def restore(self, kept: dict[str, Any]) -> None:
        """Go on with a message that an earlier process has left."""
        self.header = Header.FromString(bytes.fromhex(kept["header"]))
        self.runtime.token, self.runtime.run = str(kept["token"]), int(kept["run"])
        self.runtime.node = int(kept["node"])

    def close(self) -> None:
        """Hang up."""
        self.runtime.close()


@contextmanager
def told(door: Door) -> Iterator[None]:
    """Errors of Flower's as ours: the other side is not there, or it said no."""
    try:
        yield
    except httpx.HTTPStatusError as e:
        said = (
            f"Flower at {door.address} answered {e.response.status_code}: {e.response.text[:300]}"
        )
        if e.response.status_code in (400, 401, 403, 404, 409, 412):
            raise Refused(said) from e
        raise Unreachable(said) from e
    except (httpx.HTTPError, ObjectPullError, ObjectPushError) as e:
        raise Unreachable(f"Flower at {door.address}: {e}") from e


def _client(kind: Any, door: Door, *interceptors: Any) -> Any:
    return kind.from_server_address(
        server_address=door.address,
        insecure=door.authority is None,
        root_certificates=door.authority,
        interceptors=interceptors,
    )


def _begun(door: Door) -> int:
    """A new run, whose bundle carries no code."""
    data = io.BytesIO()
    content = f"pyproject.toml,{hashlib.sha256(BUNDLE).hexdigest()},{8 * len(BUNDLE)}"
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("pyproject.toml", BUNDLE)
        archive.writestr(".info/CONTENT", content)
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    fab = fab_to_proto(Fab(digest, data.getvalue(), {}))
    client = _client(ControlHttpClient, door)
    try:
        with told(door):
            answer = client.StartRun(StartRunRequest(fab=fab))
    finally:
        client.close()
    if not answer.HasField("run_id"):
        raise Refused("the SuperLink began no run")
    return int(answer.run_id)


def _packed(header: dict[str, Any], body: bytes) -> RecordDict:
    """Few of Flower's objects, each of which is a call or more: small bytes go with the words."""
    words = ConfigRecord({"header": json.dumps(header)})
    if len(body) <= SMALL:
        words["body"] = body
        return RecordDict({RECORD: words})
    array = Array(dtype="uint8", shape=(len(body),), stype="bytes", data=body)
    return RecordDict({RECORD: words, "body": ArrayRecord({"body": array})})


def _parcel(message: Message) -> Parcel:
    node = int(message.metadata.src_node_id)
    if message.has_error():
        return Parcel({}, b"", node, error=f"{message.error.code}: {message.error.reason}")
    try:
        words = message.content[RECORD]
        header = json.loads(str(words["header"]))
        body = words["body"] if "body" in words else message.content["body"]["body"].data
        if not isinstance(header, dict) or not isinstance(body, bytes):
            raise TypeError("of another form")
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        return Parcel({}, b"", node, error=f"no message of fedtorch's ({e})")
    return Parcel(header, body, node)


server_app, client_app = ServerApp(), ClientApp()
NO = "fedtorch serves this run by itself: start the SuperLink and each SuperNode with --isolation process"


@server_app.main()  # type: ignore[untyped-decorator]
def _server(grid: object, context: object) -> NoReturn:
    raise RuntimeError(NO)


@client_app.train()  # type: ignore[untyped-decorator]
def _client_app(message: object, context: object) -> NoReturn:
    raise RuntimeError(NO)
