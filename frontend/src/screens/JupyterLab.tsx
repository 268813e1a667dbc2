import type { Sandbox } from "../store";
import { Dialog } from "../ui";

/** How to open the sandbox's kernel in JupyterLab (docs/jupyterlab.md). The key stays a placeholder. */
export function JupyterLab({ sandbox, close }: { sandbox: Sandbox; close: () => void }) {
  const base = location.href.replace(/\/?#.*$/, "").replace(/\/$/, "");
  const commands = `pip install jupyterlab\nJUPYTER_GATEWAY_AUTH_TOKEN=$KEY jupyter lab --gateway-url=${base}`;
  return (
    <Dialog title="Open in JupyterLab" close={close} isWide>
      <p>JupyterLab can use this kernel with all its variables. Start it with your key in place of $KEY:</p>
      <pre class="sample">{commands}</pre>
      <p>
        Then choose the kernel <code>{sandbox.kernelID.slice(0, 8)}</code> in the list of running kernels.
      </p>
      <footer>
        <button type="button" onClick={() => navigator.clipboard.writeText(commands)}>
          Copy
        </button>
      </footer>
    </Dialog>
  );
}
