"""The route table, and nothing else."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from tornado.httputil import HTTPServerRequest
from tornado.web import Application

from kernel_gateway.api import checkpoints, commands, events, figures, jupyter, mcp, ports, rest, shares
from kernel_gateway.api.base import NOBODY, Endpoint, Missing, Requests, Route
from kernel_gateway.api.channels import Channels
from kernel_gateway.api.e2b import control, envd, interpreter, rpc, templates
from kernel_gateway.api.e2b.plane import ENVD, INTERPRETER, Plane, place_of_headers
from kernel_gateway.api.guesses import Guesses
from kernel_gateway.api.openapi import document, serve_document
from kernel_gateway.api.page import Page
from kernel_gateway.api.ports import Preview
from kernel_gateway.api.socket import Socket, Sockets
from kernel_gateway.api.stream import AgentStream
from kernel_gateway.errors import CellvmError, InvalidRequest, Misdirected, NotFound
from kernel_gateway.kernel.events import Cell
from kernel_gateway.mcp.protocol import Failure
from kernel_gateway.network.policy import Floor
from kernel_gateway.ports import NONE, Place, place_of_host, place_of_path
from kernel_gateway.sandbox.lifecycle import Event
from kernel_gateway.sandbox.sandboxes import Sandboxes
from kernel_gateway.sandbox.store import Store
from kernel_gateway.sandbox.timeline import Checkpoint
from kernel_gateway.webhooks import EventModel, Targets

log = logging.getLogger(__name__)

NO_PLACE = "there is no such path in a sandbox"
NO_PATH = "GET /openapi.json lists what there is"
PUBLIC = Targets(Floor)
KEYS_TICK = 0.5
"""Seconds between looks at the keys."""

BOX = "/sandboxes/{id}"
COMMAND = f"{BOX}/commands/{{command}}"
FS = f"{BOX}/filesystem"
KERNEL = "/api/kernels/{kernel}"
SESSION = "/api/sessions/{session}"
WEBHOOK = "/events/webhooks/{webhook}"
BUILD = "/templates/{template}/builds/{build}"

ROUTES = [
    Route("GET", "/health", rest.health, answer=rest.Health, public=True),
    Route("GET", "/openapi.json", serve_document, answer=dict, public=True),
    Route("GET", "/api/swagger.json", serve_document, answer=dict, public=True),
    Route("GET", "/api/spec.yaml", serve_document, answer=dict, public=True),
    Route("GET", "/metrics", figures.figures, produces="text/plain", errors=(403,)),
    Route("GET", "/limits", rest.limits, answer=rest.LimitsModel),
    Route("GET", "/templates", templates.list_templates, answer=list[templates.TemplateModel]),
    Route("GET", "/v2/templates", templates.list_templates, answer=list[templates.TemplateModel]),
    Route(
        "GET", "/templates/aliases/{template}", templates.get_template, answer=templates.TemplateModel, errors=(404,),
    ),
    Route(
        "POST", "/templates/tags", templates.assign_tags, body=templates.AssignTags, answer=templates.AssignedTags,
        status=201, errors=(404,),
    ),
    Route("DELETE", "/templates/tags", templates.remove_tags, body=templates.RemoveTags, status=204, errors=(404,)),
    Route("GET", "/templates/{template}", templates.get_template, answer=templates.TemplateModel, errors=(404,)),
    Route("GET", "/templates/{template}/tags", templates.list_tags, answer=list[templates.TagModel], errors=(404,)),
    Route(
        "POST", "/v3/templates", templates.request_build, body=templates.RequestBuild, answer=templates.BuildModel,
        status=202, errors=(409, 501),
    ),
    Route(
        "GET", "/templates/{template}/files/{files}", templates.upload_link, answer=templates.UploadLink, status=201,
        errors=(404, 409),
    ),
    Route(
        "PUT", "/templates/{template}/files/{files}", templates.upload, query=templates.UploadPermit, upload=True,
        public=True, errors=(401, 404, 409, 429, 507),
    ),
    Route(
        "POST", f"/v2{BUILD}", templates.start_build, body=templates.StartBuild, status=202, errors=(404, 409),
    ),
    Route(
        "GET", f"{BUILD}/status", templates.build_status, query=templates.StatusQuery, answer=templates.StatusModel,
        errors=(404,),
    ),
    Route(
        "POST", "/sandboxes", control.create_sandbox, body=control.CreateSandbox, answer=control.SandboxWithTokens,
        status=201, errors=(409, 501),
    ),
    Route(
        "POST", "/v2/sandboxes", control.create_sandbox, body=control.CreateSandbox, answer=control.SandboxWithTokens,
        status=201, errors=(409, 501),
    ),
    Route("GET", "/v2/sandboxes", control.list_sandboxes, query=control.SandboxesQuery, answer=list[rest.SandboxModel]),
    Route(
        "POST", "/v2/sandboxes/{id}/connect", control.connect, body=control.Connect, answer=control.SandboxWithTokens,
        also=201, errors=(501,),
    ),
    Route("GET", "/sandboxes", rest.list_sandboxes, query=rest.SandboxFilter, answer=list[rest.SandboxModel]),
    Route("GET", BOX, control.get_sandbox, answer=control.SandboxWithTokens),
    Route("DELETE", BOX, rest.delete_sandbox, status=204),
    Route("POST", f"{BOX}/shutdown", rest.delete_sandbox, status=204),
    Route(
        "POST", f"{BOX}/connect", control.connect, body=control.Connect, answer=control.SandboxWithTokens, also=201,
        errors=(501,),
    ),
    Route("POST", f"{BOX}/timeout", control.set_timeout, body=control.SetTimeout, status=204),
    Route("POST", f"{BOX}/refreshes", rest.refresh, body=rest.Refresh, status=204),
    Route("POST", f"{BOX}/pause", rest.pause, body=rest.Pause, status=204, errors=(501, 507)),
    Route(
        "POST", f"{BOX}/resume", rest.resume, body=rest.Resume, answer=rest.SandboxModel, status=201, errors=(501,),
    ),
    Route(
        "POST", f"{BOX}/snapshots", rest.take_snapshot, body=rest.TakeSnapshot, answer=rest.SnapshotModel, status=201,
        errors=(409, 501, 507),
    ),
    Route("GET", "/snapshots", rest.list_snapshots, query=rest.SnapshotsQuery, answer=list[rest.SnapshotModel]),
    Route("DELETE", "/snapshots/{snapshot}", rest.delete_snapshot, status=204, errors=(404,)),
    Route("DELETE", "/templates/{template}", templates.delete_template, status=204, errors=(404,)),
    Route(
        "POST", f"{BOX}/fork", control.fork, body=rest.Fork, answer=list[control.ForkModel], status=201,
        errors=(501, 507),
    ),
    Route(
        "POST", f"{BOX}/share", shares.make_share, body=shares.MakeShare, answer=shares.ShareModel, status=201,
    ),
    Route("GET", f"{BOX}/share", shares.list_shares, answer=list[shares.ShareModel]),
    Route("DELETE", f"{BOX}/share/{{share}}", shares.revoke_share, status=204),
    Route(
        "POST", f"{BOX}/checkpoints", checkpoints.take, answer=Checkpoint, status=201, errors=(501, 507),
    ),
    Route("POST", f"{BOX}/checkpoints/{{checkpoint}}/restore", checkpoints.restore, status=204, errors=(501,)),
    Route("DELETE", f"{BOX}/checkpoints/{{checkpoint}}", checkpoints.delete, status=204),
    Route("GET", f"{BOX}/timeline", checkpoints.timeline, answer=checkpoints.TimelineModel),
    Route("GET", f"{BOX}/network", rest.get_network, answer=rest.NetworkState),
    Route("PUT", f"{BOX}/network", rest.set_network, body=rest.SetNetwork, status=204, errors=(501,)),
    Route("GET", f"{BOX}/ports", ports.list_ports, answer=ports.PortsModel),
    Route("PUT", f"{BOX}/ports", ports.set_port, body=ports.SetPort, status=204),
    Route(
        "POST", f"{BOX}/processes", commands.run_process, body=commands.RunProcess, answer=commands.ProcessResult,
    ),
    Route("GET", f"{BOX}/commands", commands.list_commands, answer=list[commands.CommandModel]),
    Route(
        "POST", f"{BOX}/commands", commands.start_command, body=commands.StartCommand, answer=commands.CommandModel,
        status=201, produces="application/json", errors=(403,),
    ),
    Route(
        "GET", COMMAND, commands.get_command, query=rest.Since, answer=commands.CommandModel,
        produces="application/json",
    ),
    Route("POST", f"{COMMAND}/stdin", commands.send_stdin, body=commands.Input, status=204),
    Route("DELETE", f"{COMMAND}/stdin", commands.close_stdin, status=204),
    Route("POST", f"{COMMAND}/signal", commands.signal_command, body=commands.SendSignal, status=204),
    Route("PUT", f"{COMMAND}/size", commands.resize_command, body=commands.Size, status=204),
    Route(
        "GET", f"{BOX}/executions/{{execution}}", rest.get_execution, query=rest.ExecutionQuery,
        answer=rest.ExecutionModel, produces="application/json",
    ),
    Route("DELETE", f"{BOX}/executions/{{execution}}", rest.stop_execution, status=204),
    Route("GET", f"{BOX}/export", rest.export, query=rest.ExportQuery, produces="application/x-ipynb+json"),
    Route(
        "POST", f"{BOX}/execute", rest.execute, body=rest.Execute, answer=Cell, produces="application/json",
    ),
    Route(
        "GET", f"{BOX}/files", rest.download, query=rest.PathQuery, produces="application/octet-stream",
        errors=(403, 416),
    ),
    Route(
        "POST", f"{BOX}/files", rest.upload, query=rest.UploadQuery, answer=list[rest.FileEntry], upload=True,
        errors=(403, 507),
    ),
    Route("GET", f"{FS}/download", rest.download, query=rest.PathQuery, produces="application/octet-stream",
          errors=(403, 416)),
    Route(
        "POST", f"{FS}/upload", rest.upload, query=rest.UploadQuery, answer=list[rest.FileEntry], upload=True,
        errors=(403, 507),
    ),
    Route("GET", FS, rest.read_inline, query=rest.PathQuery, answer=rest.InlineFile, errors=(403,)),
    Route("POST", FS, rest.write_inline, body=rest.InlineFile, answer=rest.FileEntry, errors=(403, 507)),
    Route("DELETE", FS, rest.delete_file, query=rest.PathQuery, status=204, errors=(403,)),
    Route("GET", f"{FS}/list", rest.list_dir, query=rest.ListQuery, answer=list[rest.FileEntry], errors=(403, 413)),
    Route("GET", f"{FS}/stat", rest.stat, query=rest.PathQuery, answer=rest.FileEntry, errors=(403,)),
    Route("POST", f"{FS}/mkdir", rest.make_dir, body=rest.MakeDir, answer=rest.FileEntry, errors=(403, 409, 507)),
    Route("POST", f"{FS}/move", rest.move, body=rest.Move, answer=rest.FileEntry, errors=(403, 507)),
    Route("GET", f"{BOX}/health", rest.sandbox_health, status=204),
    Route(
        "GET", f"{BOX}/metrics", control.metrics, query=control.MetricsQuery,
        answer=rest.MetricsModel | list[control.Metric],
    ),
    Route("GET", f"{BOX}/envs", commands.envs, answer=dict[str, str]),
    Route("GET", "/volumes", control.not_offered, status=204, errors=(501,)),
    Route("POST", "/volumes", control.not_offered, status=204, errors=(501,)),
    Route("GET", "/volumes/{volume}", control.not_offered, status=204, errors=(501,)),
    Route("DELETE", "/volumes/{volume}", control.not_offered, status=204, errors=(501,)),
    Route("GET", "/secrets", control.not_offered, status=204, errors=(501,)),
    Route("POST", "/secrets", control.not_offered, status=204, errors=(501,)),
    Route("PUT", "/secrets/{secret}", control.not_offered, status=204, errors=(501,)),
    Route("DELETE", "/secrets/{secret}", control.not_offered, status=204, errors=(501,)),
    Route("GET", "/events", events.stream_events, query=events.StreamQuery, produces="text/event-stream"),
    Route("GET", "/events/sandboxes", events.list_events, query=events.EventQuery, answer=list[EventModel]),
    Route("GET", "/events/sandboxes/{id}", events.list_events, query=events.EventQuery, answer=list[EventModel]),
    Route("GET", "/events/webhooks", events.list_webhooks, answer=list[events.WebhookModel]),
    Route(
        "POST", "/events/webhooks", events.add_webhook, body=events.WebhookBody, answer=events.WebhookModel, status=201
    ),
    Route("GET", WEBHOOK, events.get_webhook, answer=events.WebhookModel, errors=(404,)),
    Route("DELETE", WEBHOOK, events.remove_webhook, status=204, errors=(404,)),
    Route(
        "GET", f"{WEBHOOK}/deliveries", events.list_deliveries, query=events.DeliveryQuery,
        answer=list[events.DeliveryModel], errors=(404,),
    ),
    Route(
        "POST", "/mcp", mcp.serve, query=mcp.McpQuery, refusal=Failure, produces="application/json", errors=(404,),
    ),
    Route("DELETE", "/mcp", mcp.delete_session, errors=(404,)),
    Route("GET", "/api", jupyter.api_version, answer=jupyter.ApiVersion, public=True),
    Route("GET", "/api/me", jupyter.me, answer=jupyter.Me),
    Route("GET", "/api/status", jupyter.status, answer=jupyter.ServerStatus),
    Route("GET", "/api/kernelspecs", jupyter.list_specs, answer=jupyter.Specs),
    Route("GET", "/api/kernelspecs/{name}", jupyter.get_spec, answer=jupyter.SpecModel, errors=(404,)),
    Route("GET", "/kernelspecs/{name}/{file}", jupyter.spec_file, produces="image/svg+xml", public=True, errors=(404,)),
    Route("GET", "/api/kernels", jupyter.list_kernels, answer=list[jupyter.KernelModel]),
    Route(
        "POST", "/api/kernels", jupyter.start_kernel, body=jupyter.StartKernel, answer=jupyter.KernelModel, status=201,
        errors=(404,),
    ),
    Route("GET", KERNEL, jupyter.get_kernel, answer=jupyter.KernelModel),
    Route("DELETE", KERNEL, jupyter.delete_kernel, status=204),
    Route("POST", f"{KERNEL}/interrupt", jupyter.interrupt_kernel, status=204),
    Route("POST", f"{KERNEL}/restart", jupyter.restart_kernel, answer=jupyter.KernelModel),
    Route("GET", f"{KERNEL}/journal", jupyter.journal, query=jupyter.JournalQuery, answer=jupyter.JournalPage),
    Route("GET", "/api/sessions", jupyter.list_sessions, answer=list[jupyter.SessionModel]),
    Route(
        "POST", "/api/sessions", jupyter.start_session, body=jupyter.SessionBody, answer=jupyter.SessionModel,
        status=201, errors=(404, 409),
    ),
    Route("GET", SESSION, jupyter.get_session, answer=jupyter.SessionModel),
    Route(
        "PATCH", SESSION, jupyter.change_session, body=jupyter.SessionBody, answer=jupyter.SessionModel
    ),
    Route("DELETE", SESSION, jupyter.delete_session, status=204),
]  # fmt: skip

SOCKETS: list[tuple[str, type[Socket]]] = [
    (r"/api/kernels/([^/]+)/channels/?", Channels),
    (r"/sandboxes/([^/]+)/stream/?", AgentStream),
]
"""WebSockets, by the pattern of their path; docs/stream.md and docs/rest.md describe them."""
PAGE = [r"/?", r"/ui/((?:lib/)?[\w.]+)"]
"""The web page and its files; docs/page.md describes it."""


NO_METHOD = Route("POST", "/{service}/{method}", rpc.not_offered, produces="application/json")
Planes = dict[str, list[tuple[re.Pattern[str], type[Plane], dict[str, Route]]]]


def by_path(routes: list[Route]) -> dict[str, dict[str, Route]]:
    """The routes of each pattern of a path, by their methods."""
    found: dict[str, dict[str, Route]] = {}
    for route in routes:
        found.setdefault(route.pattern, {})[route.method] = route
    return found


PLANES: Planes = {
    ENVD: [
        (re.compile(pattern), kind, found)
        for kind, table in ((Plane, envd.ROUTES), (rpc.Rpc, rpc.ROUTES))
        for pattern, found in by_path(table).items()
    ]
    + [(re.compile(r"/([^/]+\.[^/]+)/([^/]+)"), rpc.Procedure, {"POST": NO_METHOD})],
    INTERPRETER: [
        (re.compile(pattern), interpreter.Interpreter, found) for pattern, found in by_path(interpreter.ROUTES).items()
    ],
}
"""What is in a sandbox for E2B's clients, by the port that they name."""


class Gateway(Application):
    """Routes requests by their path, without the base URL and `/t/KEY` at its beginning.

    Some clients (jupyter_server's kernel client among them) can send a key with a WebSocket only in its path.
    A request for a service in a sandbox bypasses the table, because such a service may have any path.
    """

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Called by Tornado for each request, before anything else reads or logs the path."""
        domain = self.settings["domain_name"]
        if place := place_of_host(request.host_name, domain):
            return self._inside(request, place, request.path) or self._missing(request, NotFound(NO_PLACE))
        if request.host_name != f"api.{domain}" and not is_ours(request.host_name, self.settings["hosts"]):
            error = Misdirected(
                f"this server is not known as {request.host_name!r:.100}",
                hint="the operator allows the name with --allow-host; a proxy may send `Host: localhost` instead",
            )
            return self._missing(request, error)
        base = self.settings["base_url"]
        if base and not f"{request.path}/".startswith(f"{base}/"):
            return self._missing(request, NotFound(f"all paths of this server begin with {base}"))
        path = request.path.removeprefix(base)
        before = request.path.removesuffix(path)
        try:
            named = None if request.host_name == f"api.{domain}" else place_of_headers(request.headers, path)
        except CellvmError as error:
            return self._missing(request, error)
        # Old releases send the headers with some control requests, too.
        if named is not None and (inside := self._inside(request, named, path)):
            return inside
        found = re.fullmatch(r"/+t/([^/]+)(/.*)?", path)
        if found is not None:
            path = found[2] or "/"
            if any(re.fullmatch(pattern, path) for pattern in PAGE):
                refused = InvalidRequest("the web page has no address with a key in it", hint="it asks for the key")
                return self._missing(request, refused)
            if not request.headers.get("Authorization", "").partition(" ")[2]:
                request.headers["Authorization"] = f"Bearer {unquote(found[1])}"
        if place := place_of_path(path, before):
            rest = path[len(place.prefix) - len(before) :]
            return Preview(self.settings, request, place, rest, key_in_path=found is not None)
        request.path = path
        return super().find_handler(request, **kwargs)

    def _inside(self, request: HTTPServerRequest, place: Place, path: str) -> Any:
        """A request for what is in a sandbox: a plane of E2B's clients, or a service. None for a path of no plane."""
        if place.port not in PLANES:
            return Preview(self.settings, request, place, path)
        for pattern, kind, routes in PLANES[place.port]:
            if found := pattern.fullmatch(path):
                given = {**self.settings["default_handler_args"], "routes": routes, "place": place}
                del given["error"]
                request.path = path
                return self.get_handler_delegate(
                    request, kind, given, [unquote_to_bytes(name) for name in found.groups()]
                )
        return None

    def _missing(self, request: HTTPServerRequest, error: CellvmError) -> Any:
        return self.get_handler_delegate(request, Missing, {**self.settings["default_handler_args"], "error": error})


def is_ours(host: str, hosts: frozenset[str] | None) -> bool:
    """Whether a request to that host name, without a port, is for this server.

    A web page can let its own name lead here (DNS rebinding), and would then have our answers as its own. A browser
    takes an IP address from nobody, and names below localhost from no resolver.
    """
    name = host.lower().rstrip(".")
    if hosts is None or name in hosts or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return bool(ip_address(name.strip("[]").partition("%")[0]))
    except ValueError:
        return False


def application(
    sandboxes: Sandboxes,
    store: Store,
    *,
    origins: frozenset[str] = frozenset(),
    base_url: str = "",
    max_message: int = 64 * 1024 * 1024,
    kernel_idle_timeout: int = 3600,
    kernel_max_life: int | None = None,
    mcp_idle_timeout: int = 1800,
    max_connections: int = 256,
    max_requests: int = 1000,
    domain: str = "localhost",
    hosts: frozenset[str] | None = None,
    stripped: re.Pattern[str] = NONE,
    targets: Targets = PUBLIC,
    library: Callable[[], Path | None] = lambda: None,
) -> Application:
    """The Tornado application over a collection of sandboxes and a store of keys.

    Args:
        origins: web pages of these origins may use the API.
        base_url: the beginning of every path, without a slash at its end.
        max_message: largest WebSocket message from a client, in bytes.
        kernel_idle_timeout: seconds that a Jupyter client's kernel lives on unused.
        kernel_max_life: seconds after which such a kernel ends, whatever it does; None for never.
        mcp_idle_timeout: seconds that a sandbox of an MCP client lives on after its last call.
        max_connections: WebSockets that one owner may have open at once.
        max_requests: requests that are answered at once for one owner.
        domain: services in sandboxes are reached as `{port}-{id}.{domain}`; it may include the server's port.
        hosts: names that clients may call the server by, besides IP addresses and localhost; None for all.
        stripped: matches headers, in small letters, that services in sandboxes do not get.
        targets: the receivers that webhooks may have.
        library: finds the file of plotly.js that the web page draws with; None if there is none.
    """
    sandboxes.metrics.registry.register(figures.Present(sandboxes))
    shared = {"sandboxes": sandboxes, "store": store}
    handlers: list[Any] = [
        (pattern, mcp.McpEndpoint if "/mcp" in pattern else Endpoint, {**shared, "routes": routes})
        for pattern, routes in by_path(ROUTES).items()
    ]
    handlers += [(pattern, kind, shared) for pattern, kind in SOCKETS]
    handlers += [(pattern, Page, shared) for pattern in PAGE]
    return Gateway(
        handlers,
        sandboxes=sandboxes,
        store=store,
        default_handler_class=Missing,
        default_handler_args={**shared, "error": NotFound("there is no such path", hint=NO_PATH)},
        origins=origins,
        base_url=base_url,
        domain=domain,
        domain_name=domain.partition(":")[0].strip(".").lower(),
        hosts=hosts,
        stripped=stripped,
        targets=targets,
        library=library,
        guesses=Guesses(),
        max_message=max_message,
        kernel_idle_timeout=kernel_idle_timeout,
        kernel_max_life=kernel_max_life,
        sessions=defaultdict(jupyter.Sessions),  # by key
        mcp=mcp.Mcp(mcp_idle_timeout),
        sockets=Sockets(max_connections, sandboxes.held),
        openapi=document(ROUTES),
        requests=Requests(max_requests),
        creates=control.Creates(),
        reading=asyncio.Lock(),  # held while a piece of a service's answer is read
        log_function=log_request,
    )


async def watch_keys(app: Application) -> None:
    """Cut off whoever uses a key that has been removed, also by another process.

    Its sandboxes live on to their end, unless the store says that they have ended with the key.
    """
    store: Store = app.settings["store"]
    keys = set(store.list_keys())
    while True:
        await asyncio.sleep(KEYS_TICK)
        before, keys = keys, set(store.list_keys())
        for key in before - keys:
            log.info("key %s of owner %s was removed: its connections are closed", key.id, key.owner)
        cut_others(app.settings, {key.id for key in keys} | {NOBODY.id}, {key.owner for key in keys})


def cut_others(settings: dict[str, Any], keys: set[str], owners: set[str]) -> None:
    """End what was begun with another key than these, and what the store says has ended of other owners.

    All that goes on is looked at, because a key may have been added, used and removed since the last look.
    """
    settings["sockets"].cut_others(keys)
    for request in settings["requests"]:
        if isinstance(request, Endpoint) and request.key.id not in keys:
            request.cut()
    for key_id in settings["sessions"].keys() - keys:
        for making in settings["sessions"].pop(key_id).making.values():
            making.cancel()
    for sandbox in settings["sandboxes"]:
        sandbox.cut_others(keys)
        if sandbox.owner not in owners and settings["store"].end_of(sandbox.id, sandbox.owner):
            sandbox.apply(Event.KILL)


def log_request(handler: Endpoint) -> None:
    """Count a request, and log a line of it, without the query, because a query may hold secrets."""
    request = handler.request
    handler.count()
    path = re.sub("/t/[^/]+", "/t/…", request.path, flags=re.IGNORECASE)  # a key in a misspelt address
    log.info("%s %s %s %d ms", request.method, path, handler.get_status(), round(request.request_time() * 1000))
