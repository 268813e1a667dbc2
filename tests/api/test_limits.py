"""Quotas of a key: what `GET /limits` tells, and what happens beyond them."""

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.api.clients import agent
from tests.fakes import SavingDriver, Service, error_of, eventually, serving


async def limits(service: Service, key: str = "") -> Any:
    answer = await service.call("GET", "/limits", key=key)
    assert answer.code == 200, answer.body
    return json.loads(answer.body)


async def test_limits_of_a_key(tmp_path: Path) -> None:
    """The answer has each limit and what of it the key uses. Another key's use does not show."""
    async with serving(tmp_path, per_owner=2, max_connections=7, max_requests=9, creates_per_minute=5) as service:
        nothing = {
            "sandboxes": {"limit": 2, "used": 0},
            "pausedSandboxes": {"limit": 100, "used": 0},
            "snapshots": {"limit": 100, "used": 0},
            "createsPerMinute": {"limit": 5, "used": 0, "reset": 0},
            "requests": {"limit": 9, "used": 1},
            "connections": {"limit": 7, "used": 0},
            "heldBytes": {"limit": 64 << 20, "used": 0},
            "maxTimeout": 3600,
            "checkpointBytes": 2 << 30,
        }
        assert await limits(service) == nothing
        box = await service.create()
        async with agent(service, box):
            running = asyncio.create_task(service.run(box, "sleep", "60"))
            await eventually(lambda: service.sandboxes.held.of(service.owner) > 0)
            found = await limits(service)
            assert 55 <= found["createsPerMinute"].pop("reset") <= 60
            assert found["heldBytes"].pop("used") >= 128 << 10
            used = {name: each["used"] for name, each in found.items() if isinstance(each, dict) and "used" in each}
            assert used == {
                "sandboxes": 1, "pausedSandboxes": 0, "snapshots": 0,
                "createsPerMinute": 1, "requests": 2, "connections": 1,
            }  # fmt: skip
            assert await limits(service, service.other_key) == nothing
            assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
            await asyncio.gather(running, return_exceptions=True)
        found = await limits(service)
        assert (found["sandboxes"]["used"], found["heldBytes"]["used"]) == (0, 0)
        assert (await service.call("GET", "/limits", key=None)).code == 401


async def test_the_longest_lifetime(tmp_path: Path) -> None:
    """The operator's limit holds wherever a request gives a sandbox time, and `GET /limits` tells it."""
    async with serving(tmp_path, SavingDriver(), max_timeout=7200) as service:
        box = await service.create(timeout=7200)
        path = f"/sandboxes/{box}"
        for what, field in (
            ("/sandboxes", "timeout"), (f"{path}/timeout", "timeout"), (f"{path}/fork", "timeout"),
            (f"{path}/refreshes", "duration"), (f"{path}/connect", "timeout"), (f"{path}/resume", "timeout"),
            (f"/v2{path}/connect", "timeout"),
        ):  # fmt: skip
            answer = await service.call("POST", what, {"templateID": "base", field: 7201})
            assert (answer.code, "7200" in error_of(answer)["message"]) == (400, True), what
        assert (await service.call("POST", f"{path}/timeout", {"timeout": 7200})).code == 204
        assert (await service.call("POST", f"{path}/timeout", {"timeout": 40 * 86400})).code == 400
        assert (await limits(service))["maxTimeout"] == 7200


async def test_creates_per_minute(tmp_path: Path) -> None:
    """Beyond the quota a create is 429 and says when to come again, over REST and Jupyter. Others may create."""
    async with serving(tmp_path, creates_per_minute=2) as service:
        await service.create()
        assert (await service.call("POST", "/api/kernels", {})).code == 201
        for path, body in (("/sandboxes", {"templateID": "base"}), ("/api/kernels", {})):
            answer = await service.call("POST", path, body)
            assert error_of(answer)["error"] == "too_many_requests"
            assert 55 <= int(answer.headers["Retry-After"]) <= 60
            told = {name: answer.headers[f"X-RateLimit-{name}"] for name in ("Limit", "Remaining", "Reset")}
            assert told == {"Limit": "2", "Remaining": "0", "Reset": answer.headers["Retry-After"]}
        assert (await limits(service))["createsPerMinute"]["used"] == 2
        answer = await service.call("POST", "/sandboxes", {"templateID": "base"}, key=service.other_key)
        assert answer.code == 201


async def test_requests_at_once(tmp_path: Path) -> None:
    """Beyond the quota a request is 429, until one of those under way has ended. Others are answered."""
    async with serving(tmp_path, max_requests=3) as service:
        box = await service.create()
        running = [asyncio.create_task(service.run(box, "sleep", "60")) for _ in range(3)]
        commands = service.sandboxes.get(service.owner, box).guest.commands
        await eventually(lambda: sum(1 for each in commands if each.pid) == 3)
        answer = await service.call("GET", "/sandboxes")
        error = error_of(answer)
        assert (error["error"], answer.headers["Retry-After"]) == ("too_many_requests", "5")
        assert "--max-requests" in error["hint"]
        assert (await service.call("GET", "/sandboxes", key=service.other_key)).code == 200
        assert (await service.call("GET", "/health")).code == 200
        next(iter(commands)).kill()
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        assert (await service.call("GET", "/sandboxes")).code == 200
        for command in commands:
            command.kill()
        await asyncio.gather(*running, return_exceptions=True)
    assert len(service.sandboxes) == 0


async def test_every_route_with_a_key_may_be_refused(service: Service) -> None:
    """The OpenAPI document has 429 and 503 for every route that needs a key."""
    paths = json.loads((await service.call("GET", "/openapi.json")).body)["paths"]
    operations = [each for path in paths.values() for each in path.values() if "security" not in each]
    assert len(operations) > 50
    assert all({"401", "429", "503"} <= set(each["responses"]) for each in operations)
