import { useSignal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import { Frame, type FrameKind } from "../frame";

/** Lets the scripts of one output run. */
export function Allow({ allow }: { allow: () => void }) {
  return (
    <button
      type="button"
      title="It runs apart from this page and without network, but can learn your address."
      onClick={allow}
    >
      Run this output's scripts
    </button>
  );
}

/** An output in a frame of its own, in which none of its scripts run until the user says so. */
export function Framed({ kind, data, title }: { kind: FrameKind; data: unknown; title: string }) {
  const place = useRef<HTMLDivElement>(null);
  const isBlocked = useSignal(false);
  const isLive = useSignal(kind === "script");
  useLayoutEffect(() => {
    const frame = new Frame(kind, data, title, isLive.value, () => {
      isBlocked.value = true;
    });
    place.current?.replaceChildren(frame.element);
    return () => frame.close();
  }, [kind, data, isLive.value]);
  return (
    <figure class="framed">
      <div ref={place} />
      {isBlocked.value && !isLive.value && (
        <figcaption class="notice">
          Scripts of this output were kept from running. <Allow allow={() => (isLive.value = true)} />
        </figcaption>
      )}
    </figure>
  );
}
