"""Logging as programs set it up: levels, a file, a formatter, an exception, a warning that becomes a record."""

# %%
import logging
import logging.config
import warnings

logging.config.dictConfig(
    {
        "version": 1,
        "formatters": {"plain": {"format": "%(levelname)s:%(name)s:%(message)s"}},
        "handlers": {
            "screen": {"class": "logging.StreamHandler", "formatter": "plain", "level": "WARNING"},
            "file": {"class": "logging.FileHandler", "filename": "run.log", "formatter": "plain", "encoding": "utf-8"},
        },
        "root": {"handlers": ["screen", "file"], "level": "DEBUG"},
    }
)
log = logging.getLogger("shop.orders")
log.debug("to the file only")
log.warning("stock is low: %d ✗", 3)

# %%
try:
    {}["missing"]
except KeyError as error:
    log.error("failed: %r", error)

# %%
logging.captureWarnings(True)
with warnings.catch_warnings():
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, kind, *rest: logging.getLogger("py.warnings").warning(
        "%s: %s", kind.__name__, message
    )
    warnings.warn("old way", DeprecationWarning)
logging.captureWarnings(False)
warnings.warn("seen on the error stream", UserWarning)

# %%
logging.shutdown()
len(open("run.log", encoding="utf-8").readlines())
