"""The sandboxes' internet. Each sandbox has a network of its own on the host, and every packet passes its filter.

    guest ── virtio-net ── tap │ slot: nftables, resolver, gate │ uplink ── host ── internet

`policy` and `rules` are pure: the owner's rules, and the filter made from them. A `Slot` is one sandbox's network, and
`Slots` makes them ahead. The guest, or an attacker who took over QEMU, holds only one end of a tap and can't reach the
filter.
"""
