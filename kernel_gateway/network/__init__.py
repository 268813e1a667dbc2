"""The sandboxes' internet: each has a network of its own on the host, and nothing leaves it but through a filter.

    guest ── virtio-net ── tap │ slot: nftables, resolver, gate │ uplink ── host ── internet

`policy` and `rules` are pure: what is allowed, and the filter that says so. A `Slot` is one sandbox's network, `Slots`
makes them ahead. The guest, and a QEMU that was broken into, hold one end of a tap: they can't reach the filter.
"""
