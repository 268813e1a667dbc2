"""The kernels that JupyterLab lists, starts and ends."""

import json
from typing import Any

from jupyter_server.gateway.gateway_client import gateway_request
from jupyter_server.gateway.managers import GatewayMappingKernelManager
from tornado import web


class GatewayKernels(GatewayMappingKernelManager):
    """All kernels of the key. Kernels that somebody else has started are not ended from here."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._own: set[str] = set()

    async def start_kernel(  # type: ignore[override]  # asynchronous, as in the class above
        self, *, kernel_id: str | None = None, **kwargs: Any
    ) -> str:
        """Start a kernel, or look up the one with `kernel_id`."""
        known: str = await super().start_kernel(kernel_id=kernel_id, **kwargs)
        if kernel_id is None:
            self._own.add(known)
        return known

    async def list_kernels(self, **kwargs: Any) -> list[dict[str, Any]]:
        """All kernels of the gateway. The base class lists only those that it knows already."""
        answer = await gateway_request(self.kernels_url, method="GET")
        for model in json.loads(answer.body):
            if model["id"] not in self._kernels and model["execution_state"] != "dead":
                await self.start_kernel(kernel_id=model["id"])
        kernels: list[dict[str, Any]] = await super().list_kernels(**kwargs)
        self._forget_ended()
        return kernels

    async def shutdown_kernel(  # type: ignore[override]
        self, kernel_id: str, now: bool = False, restart: bool = False
    ) -> None:
        """End an own kernel only, because this is also called when a notebook changes from an agent's kernel."""
        if kernel_id in self._own:
            await super().shutdown_kernel(kernel_id, now, restart)
            self._forget_ended()
        else:
            self.log.warning("Kernel %s was started by somebody else, and goes on", kernel_id)

    def _forget_ended(self) -> None:
        """Forget what is kept of kernels that have ended. The base class forgets them, but not their connections."""
        self._own &= self._kernels.keys()
        for kernel_id in self._kernel_connections.keys() - self._kernels.keys():
            del self._kernel_connections[kernel_id]

    async def shutdown_all(self, now: bool = False) -> None:  # type: ignore[override]
        """End all own kernels. This is called when this Jupyter server ends."""
        for kernel_id in self._own & set(self._kernels):
            try:
                await self.shutdown_kernel(kernel_id, now)
            except web.HTTPError as error:  # if raised, it would keep this process from ending
                self.log.warning("Kernel %s may go on: %s", kernel_id, error)
