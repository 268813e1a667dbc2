"""The route table, and nothing else."""

import logging

from tornado.web import Application

from kernel_gateway.api import rest
from kernel_gateway.api.base import Endpoint, Missing, Route
from kernel_gateway.api.openapi import document, serve_document
from kernel_gateway.jupyter.execution import Cell
from kernel_gateway.sandboxes import Sandboxes
from kernel_gateway.store import Store

log = logging.getLogger(__name__)

BOX = "/sandboxes/{id}"
FS = f"{BOX}/filesystem"

ROUTES = [
    Route("GET", "/health", rest.health, answer=rest.Health, public=True),
    Route("GET", "/openapi.json", serve_document, answer=dict, public=True),
    Route("GET", "/templates", rest.list_templates, answer=list[rest.TemplateModel]),
    Route("GET", "/templates/aliases/{template}", rest.get_template, answer=rest.TemplateModel, errors=(404,)),
    Route("GET", "/templates/{template}", rest.get_template, answer=rest.TemplateModel, errors=(404,)),
    Route(
        "POST", "/sandboxes", rest.create_sandbox, body=rest.CreateSandbox, answer=rest.SandboxModel, status=201,
        errors=(503,),
    ),
    Route("GET", "/sandboxes", rest.list_sandboxes, query=rest.SandboxFilter, answer=list[rest.SandboxModel]),
    Route("GET", BOX, rest.get_sandbox, answer=rest.SandboxModel),
    Route("DELETE", BOX, rest.delete_sandbox, status=204),
    Route("POST", f"{BOX}/shutdown", rest.delete_sandbox, status=204),
    Route("POST", f"{BOX}/connect", rest.connect, body=rest.Connect, answer=rest.SandboxModel),
    Route("POST", f"{BOX}/timeout", rest.set_timeout, body=rest.SetTimeout, status=204),
    Route("POST", f"{BOX}/refreshes", rest.refresh, body=rest.Refresh, status=204),
    Route("POST", f"{BOX}/pause", rest.later, status=204, errors=(501,)),
    Route("POST", f"{BOX}/resume", rest.later, status=204, errors=(501,)),
    Route("POST", f"{BOX}/processes", rest.run_process, body=rest.RunProcess, answer=rest.ProcessResult),
    Route("POST", f"{BOX}/execute", rest.execute, body=rest.Execute, answer=Cell, produces="application/json"),
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
    Route("GET", f"{FS}/list", rest.list_dir, query=rest.DirQuery, answer=list[rest.FileEntry], errors=(403,)),
    Route("GET", f"{FS}/stat", rest.stat, query=rest.PathQuery, answer=rest.FileEntry, errors=(403,)),
    Route("POST", f"{FS}/mkdir", rest.make_dir, body=rest.MakeDir, answer=rest.FileEntry, errors=(403, 409, 507)),
    Route("POST", f"{FS}/move", rest.move, body=rest.Move, answer=rest.FileEntry, errors=(403, 507)),
    Route("GET", f"{BOX}/health", rest.sandbox_health, status=204),
    Route("GET", f"{BOX}/metrics", rest.metrics, answer=rest.MetricsModel),
    Route("GET", f"{BOX}/envs", rest.envs, answer=dict[str, str]),
    Route("GET", "/events/sandboxes", rest.later, status=204, errors=(501,)),
    Route("GET", "/events/sandboxes/{id}", rest.later, status=204, errors=(501,)),
    Route("GET", "/events/webhooks", rest.later, status=204, errors=(501,)),
    Route("POST", "/events/webhooks", rest.later, status=204, errors=(501,)),
    Route("DELETE", "/events/webhooks/{webhook}", rest.later, status=204, errors=(501,)),
]  # fmt: skip


def application(sandboxes: Sandboxes, store: Store) -> Application:
    """The Tornado application over a collection of sandboxes and a store of keys."""
    by_path: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        by_path.setdefault(route.pattern, {})[route.method] = route
    handlers = [
        (pattern, Endpoint, {"routes": routes, "sandboxes": sandboxes, "store": store})
        for pattern, routes in by_path.items()
    ]
    return Application(
        handlers,
        default_handler_class=Missing,
        default_handler_args={"routes": {}, "sandboxes": sandboxes, "store": store},
        openapi=document(ROUTES),
        requests=set(),  # those being answered
        log_function=log_request,
    )


def log_request(handler: Endpoint) -> None:
    """One line a request; never the query, which may hold what is not ours to tell."""
    request = handler.request
    log.info("%s %s %s %d ms", request.method, request.path, handler.get_status(), round(request.request_time() * 1000))
