"""Imports that were done ahead: recorded while they happen, and handed over when a program asks for them.

A fork of a process that has imported pandas must look like a process that has imported nothing. Its program sees a
module only after its own `import`, together with all that this import would have loaded, in the same order. So the
ancestor records which module asked for which, what each read of the environment, and what each changed in the process.

The interpreter takes a lock for each module that it is about to load. The `Stash` hands modules over in that lock,
because then neither `sys.meta_path` nor tracebacks show it.

This file imports only what every interpreter has imported when it starts, so that nothing escapes the record.
"""

import _frozen_importlib as bootstrap
import _thread
import _warnings
import builtins
import os
import sys
from _collections_abc import Callable, Container, Iterable, Iterator
from _frozen_importlib_external import FileFinder, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:  # a fresh interpreter has not imported `typing`
    from typing import Any
Stamp = tuple[int, int, int]
Call = tuple[Callable[..., object], tuple[object, ...], dict[str, object]]
PACKAGE = "guest_agent"


def file_of(module: object) -> str:
    """The file that a module was loaded from, or nothing."""
    file = getattr(module, "__dict__", {}).get("__file__")  # no getattr, because lazy modules would import themselves
    return file if isinstance(file, str) else ""


def stamp(file: str) -> Stamp | None:
    """What tells that a file has changed. None if there is no such file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size


def stems(directory: str) -> frozenset[str]:
    """The names of top-level modules that a directory may have, and of its files that extend `sys.path`."""
    try:
        names = os.listdir(directory or ".")
        return frozenset(name if name.endswith(".pth") else name.partition(".")[0] for name in names)
    except OSError:
        return frozenset()


class Fresh:
    """What an interpreter has when it begins with the first line of its program."""

    def __init__(self) -> None:
        self.modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] != PACKAGE}
        self.path = sys.path[1:]  # the first is the way to our package
        self.meta_path = list(sys.meta_path)
        self.path_hooks = list(sys.path_hooks)
        ours = {sys.path[0]} - set(self.path)  # an editable installation has the way to our package in the path, too
        self.importers = {part for part in sys.path_importer_cache if not part.endswith(PACKAGE) and part not in ours}
        self.filters = list(_warnings.filters)
        self.environ = dict(os.environ)
        self.main = {name: value for name, value in vars(sys.modules["__main__"]).items() if name.startswith("__")}


class Trace:
    """What one module did when it was imported, without what the modules did that it loaded.

    `needs` are the modules that it asked for (True), or put into `sys.modules` by itself (False), in order.
    """

    def __init__(self) -> None:
        self.needs: dict[str, bool] = {}
        self.reads: set[str] = set()
        self.environ: dict[str, str] = {}
        self.filters: list[Any] = []
        self.finders: list[Any] = []
        self.at_exit: list[Call] = []

    @property
    def has_effects(self) -> bool:
        return bool(self.environ or self.filters or self.finders or self.at_exit)


class Recorder:
    """Records imports from now on, until `stop`."""

    def __init__(self) -> None:
        self.traces: dict[str, Trace] = {}
        self._loading = [""]
        self._known = set(sys.modules)
        self._state()
        self._undo: list[Callable[[], None]] = []
        import atexit  # built in, so it is no file; a fresh interpreter does not show it

        find_and_load, load = bootstrap._find_and_load, bootstrap._find_and_load_unlocked  # type: ignore[attr-defined]
        resolve, package_of = bootstrap._resolve_name, bootstrap._calc___package__  # type: ignore[attr-defined]
        register = atexit.register
        importing, get = builtins.__import__, os._Environ.__getitem__

        def recorded_import(name, globals=None, locals=None, fromlist=(), level=0):  # type: ignore[no-untyped-def]  # noqa: A002
            try:
                whole = resolve(name, package_of(globals), level) if level else name
            except ImportError:
                return importing(name, globals, locals, fromlist, level)
            self._need(whole)
            module = importing(name, globals, locals, fromlist, level)
            names = getattr(module, "__all__", ()) if "*" in (fromlist or ()) else fromlist
            for each in names or ():
                if f"{whole}.{each}" in sys.modules:
                    self._need(f"{whole}.{each}")
            return module

        def recorded_find(name: str, import_: object) -> object:
            self._need(name)
            return find_and_load(name, import_)

        def recorded_load(name: str, import_: object) -> object:
            self._top.needs.pop(name, None)
            self._attribute()
            self._need(name)
            self._loading.append(name)
            try:
                return load(name, import_)
            finally:
                self._attribute()
                self._loading.pop()
                self._known.add(name)

        def recorded_register(function, *args, **options):  # type: ignore[no-untyped-def]
            self._top.at_exit.append((function, args, options))
            return register(function, *args, **options)

        def recorded_get(environ: "os._Environ[str]", name: str) -> str:
            self._top.reads.add(name)
            return get(environ, name)

        self._replace(builtins, "__import__", recorded_import)
        self._replace(bootstrap, "_find_and_load", recorded_find)
        self._replace(bootstrap, "_find_and_load_unlocked", recorded_load)
        self._replace(atexit, "register", recorded_register)
        self._replace(os._Environ, "__getitem__", recorded_get)

    def stop(self) -> None:
        self._attribute()
        for undo in self._undo:
            undo()

    def _replace(self, place: object, name: str, value: object) -> None:
        before = getattr(place, name)
        self._undo.append(lambda: setattr(place, name, before))
        setattr(place, name, value)

    @property
    def _top(self) -> Trace:
        return self.traces.setdefault(self._loading[-1], Trace())

    def _need(self, name: str) -> None:
        if name != self._loading[-1]:
            self._top.needs.setdefault(name, True)

    def _state(self) -> None:
        self._environ = dict(os.environ._data)  # type: ignore[attr-defined]
        self._filters = list(_warnings.filters)
        self._finders = list(sys.meta_path)

    def _attribute(self) -> None:
        """Take what has changed since the last load began or ended for the work of the module that is being loaded."""
        if len(sys.modules) != len(self._known):
            brought = [name for name in sys.modules if name not in self._known and name not in self._loading]
            if brought:
                self._top.needs.update(dict.fromkeys(brought, False))
                self._known.update(brought)
        environ, decode = os.environ._data, os.fsdecode  # type: ignore[attr-defined]
        if environ != self._environ:
            changed = {k: v for k, v in environ.items() if self._environ.get(k) != v}
            self._top.environ |= {decode(name): decode(value) for name, value in changed.items()}
        if _warnings.filters != self._filters:
            self._top.filters += [each for each in _warnings.filters if each not in self._filters]
        if sys.meta_path != self._finders:
            self._top.finders += [each for each in sys.meta_path if each not in self._finders]
        self._state()


class Stash:
    """The modules that were imported ahead, in a fork, by the names that its program has not asked for yet.

    Args:
        fresh: the ancestor at its start.
        traces: what the ancestor's imports did.
    """

    def __init__(self, fresh: Fresh, traces: dict[str, Trace]) -> None:
        self._fresh = fresh
        self._traces = traces
        # The program's own module is made for it, and goes when it ends.
        self._all = {
            name: module for name, module in sys.modules.items() if name.split(".")[0] not in (PACKAGE, "__main__")
        }
        if "__mp_main__" in self._all:  # its second name in `multiprocessing`
            self._all["__mp_main__"] = None  # type: ignore[assignment]
        self._left = {name: module for name, module in self._all.items() if name not in fresh.modules}
        self._stamps = {name: (file, stamp(file)) for name, module in self._left.items() if (file := file_of(module))}
        self._fixed = {name for name, (file, _) in self._stamps.items() if file.endswith(".so")}
        self._listings = {part: (stamp(part), stems(part)) for part in fresh.path}
        written = {name for trace in traces.values() for name in trace.environ}
        self._read = {name for trace in traces.values() for name in trace.reads} - written
        self._lock = _thread.RLock()
        self._finders = list(fresh.meta_path)
        self._atexit = sys.modules["atexit"]
        self._given: dict[str, int] = {}
        self.on_arrival: dict[str, Callable[..., object]] = {}
        self._unbind()

    @property
    def reads(self) -> set[str]:
        """Variables of the environment that some import has read."""
        return self._read

    def are_current(self) -> bool:
        """Whether an interpreter that starts now would find the same files everywhere."""
        changed = {part for part, (before, _) in self._listings.items() if stamp(part) != before}
        if not changed:
            return True
        if any(stamp(file) != before for file, before in self._stamps.values()):
            return False
        tops = {name.partition(".")[0] for name in [*self._all, *(n for t in self._traces.values() for n in t.needs)]}
        tops |= {"sitecustomize", "usercustomize"}
        for part in changed:
            new = stems(part)
            added = new - self._listings[part][1]
            if added & tops or any(name.endswith(".pth") for name in added):
                return False
            self._listings[part] = (stamp(part), new)
        return True

    def open(self) -> None:
        """Show what a fresh interpreter has, and hand over the rest on request.

        The zygote does this once, because a fork is quick as long as it writes to few pages.
        """
        fresh = self._fresh
        self._atexit._clear()
        self._atexit.register(self._release)  # the first of all, so it is called last
        if "weakref" in sys.modules:
            sys.modules["weakref"].finalize._registered_with_atexit = False
        sys.modules.clear()
        sys.modules.update(fresh.modules)
        sys.path[:], sys.meta_path[:], sys.path_hooks[:] = fresh.path, fresh.meta_path, fresh.path_hooks
        for part in sys.path_importer_cache.keys() - fresh.importers:
            del sys.path_importer_cache[part]
        for finder in sys.path_importer_cache.values():
            if isinstance(finder, FileFinder):
                finder.invalidate_caches()
        _warnings.filters[:] = fresh.filters
        _warnings._filters_mutated()  # type: ignore[attr-defined]
        stash = self
        manager = bootstrap._ModuleLockManager  # type: ignore[attr-defined]

        class _ModuleLockManager(manager):  # type: ignore[misc, valid-type]
            def __enter__(self) -> None:
                super().__enter__()
                if self._name in stash._left and self._name not in sys.modules:
                    stash.take(self._name)

        bootstrap._ModuleLockManager = _ModuleLockManager  # type: ignore[attr-defined]

    def take(self, name: str) -> None:
        """Put the module and all that its import would have loaded into `sys.modules`, if that is still true."""
        with self._lock:
            order = self._order(name, sys.modules)
            if wrong := self._wrong(order):
                self._drop(wrong)
                if name not in self._left:
                    return
                order = self._order(name, sys.modules)
            for each in order:
                self._hand_over(each)

    def _order(self, name: str, present: Container[str]) -> list[str]:
        """What the import of `name` would load, in the order in which it would be ready.

        Args:
            present: names of modules that are loaded.
        """
        order: list[str] = []
        seen: set[str] = set()
        path = [("", self._with_packages(name))]
        while path:
            current, rest = path[-1]
            for each in rest:
                if each in self._left and each not in seen and each not in present:
                    seen.add(each)
                    path.append((each, self._asks(each)))
                    break
            else:
                order.append(current)
                path.pop()
        return order[:-1]

    def _with_packages(self, name: str) -> Iterator[str]:
        at = name.find(".")
        while at > 0:
            yield name[:at]
            at = name.find(".", at + 1)
        yield name

    def _asks(self, name: str) -> Iterator[str]:
        """The modules that the import of this one asks for."""
        if name in self._traces:
            for each, is_asked in self._traces[name].needs.items():
                if is_asked:
                    yield from self._with_packages(each)
                else:
                    yield each

    def _wrong(self, order: list[str]) -> set[str]:
        """The modules among them that an import would not find as they are, or that would come out otherwise."""
        wrong = {
            name for name in order if name in self._stamps and stamp(self._stamps[name][0]) != self._stamps[name][1]
        }
        differ = {name for name in self._read if os.environ.get(name) != self._fresh.environ.get(name)}
        asked: dict[str, list[str]] = {}
        for name in order:
            asked.setdefault(name.partition(".")[0], []).append(name)
            if name not in self._traces:
                continue
            if differ and differ & self._traces[name].reads:
                wrong.add(name)
            for each in self._traces[name].needs:
                if each in self._all:
                    if each in sys.modules and sys.modules[each] is not self._all[each]:
                        wrong.add(name)
                else:
                    asked.setdefault(each.partition(".")[0], []).append(name)
        for top in self._found_elsewhere(asked.keys()):
            wrong.update(asked[top])
        return wrong

    def _found_elsewhere(self, tops: Iterable[str]) -> set[str]:
        """Names of top-level modules that a finder or a directory has now, and had not when they were imported."""
        found: set[str] = set()
        for part in sys.path:
            if part in self._listings:
                before, listed = self._listings[part]
                if stamp(part) != before:
                    found |= (stems(part) - listed) & set(tops)
            elif os.path.isdir(part or "."):
                found |= stems(part) & set(tops)
            elif os.path.exists(part):
                found |= {top for top in tops if PathFinder.find_spec(top, [part]) is not None}
        for finder in sys.meta_path:
            if finder not in self._finders:
                found |= {top for top in tops if finder.find_spec(top, None) is not None}
        return found

    def _drop(self, wrong: set[str]) -> None:
        """Leave these modules, and all that needs them, to true imports.

        An extension module stays, because a process can't load it twice.
        """
        needed_by: dict[str, list[str]] = {}
        for name in self._left:
            for each in (*self._with_packages(name), *self._asks(name)):
                needed_by.setdefault(each, []).append(name)
        left = list(wrong)
        while left:
            name = left.pop()
            if name in self._left and name not in self._fixed:
                del self._left[name]
                left += needed_by.get(name, ())

    def _hand_over(self, name: str) -> None:
        module = sys.modules[name] = self._left.pop(name) or sys.modules["__main__"]
        if name in self._stamps and name not in self._fixed:
            self._given[name] = len(vars(module))
        parent, _, child = name.rpartition(".")
        if parent and parent in sys.modules and (parent, child) in self._unbound:
            setattr(sys.modules[parent], child, module)
            if parent in self._given:
                self._given[parent] += 1
        if name in self.on_arrival:
            self.on_arrival[name](module)
        trace = self._traces.get(name)
        if trace is None or not trace.has_effects:
            return
        os.environ.update(trace.environ)
        if trace.filters:
            for item in reversed(trace.filters):
                _warnings.filters.insert(0, item)
            _warnings._filters_mutated()  # type: ignore[attr-defined]
        sys.meta_path += trace.finders
        self._finders += trace.finders
        for function, args, options in trace.at_exit:
            self._atexit.register(function, *args, **options)

    def _release(self) -> None:
        """Leave modules as they are when the interpreter ends, if the program has put nothing into them.

        It would write to the pages of each, to free memory that goes with the process.
        """
        if sys._getframe().f_back is not None:
            return  # the program calls the functions of `atexit` itself
        for name, size in self._given.items():
            module = self._all[name]
            if sys.modules.get(name) is module and len(vars(module)) == size:
                del sys.modules[name]

    def _unbind(self) -> None:
        """Take modules out of their packages where the import of the package alone would not have put them."""
        self._unbound: set[tuple[str, str]] = set()
        inside: dict[str, set[str]] = {}
        for name, module in self._left.items():
            parent, _, child = name.rpartition(".")
            if not parent or vars(self._all[parent]).get(child) is not module:
                continue
            if parent not in inside:
                inside[parent] = set(self._order(parent, self._fresh.modules)) if parent in self._left else set()
            if name not in inside[parent]:
                self._unbound.add((parent, child))
        for parent, child in self._unbound:
            vars(self._all[parent]).pop(child, None)  # one module may have two names
