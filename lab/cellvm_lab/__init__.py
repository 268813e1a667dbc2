"""What a user's own Jupyter server loads so that JupyterLab works well with CellVM (docs/jupyterlab.md).

This package runs beside JupyterLab, on the client's machine. It needs jupyter_server and nothing of CellVM's server.
It speaks HTTP with CellVM, and uses the address and the key that `jupyter lab --gateway-url` was given.
"""

from pathlib import Path

from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.serverapp import ServerApp

from cellvm_lab.cells import routes
from cellvm_lab.connection import GatewayConnection
from cellvm_lab.contents import SandboxContents
from cellvm_lab.kernels import GatewayKernels

__all__ = ["GatewayConnection", "GatewayKernels", "SandboxContents"]
__version__ = "0.1.0"

CLASSES = {
    "kernel_websocket_connection_class": GatewayConnection,
    "kernel_manager_class": GatewayKernels,
    "contents_manager_class": SandboxContents,
}
"""The settings of ServerApp that name the classes."""
PAGES = str(Path(__file__).with_name("labextensions"))
"""What JupyterLab's pages load."""


def _link_jupyter_server_extension(app: ServerApp) -> None:
    """Set the classes and the folder of what pages load, before the app makes anything of them.

    A class that the user has configured stays. Without a gateway nothing is set, because the classes need one.
    """
    if GatewayClient.instance(parent=app).gateway_enabled:
        for name, kind in CLASSES.items():
            if name not in app.config.ServerApp:
                setattr(app, name, kind)
        app.config.LabServerApp.extra_labextensions_path.append(PAGES)


def _load_jupyter_server_extension(app: ServerApp) -> None:
    """Add the routes that pages ask for output. jupyter_server calls this too late for the classes."""
    if GatewayClient.instance(parent=app).gateway_enabled:
        app.web_app.add_handlers(".*$", list(routes(app.base_url)))
