// Builds the page into `kernel_gateway/_page`, which is committed: node build.mjs [FOLDER]
// The page is made of ES modules, so that the editor comes after the first paint. The scripts of frames are classic ones,
// because a frame's origin is opaque, and modules would need CORS.
import { copyFile, mkdir, rm } from "node:fs/promises";
import { build } from "esbuild";

const here = new URL(".", import.meta.url).pathname;
const out = process.argv[2] ?? `${here}../kernel_gateway/_page`;
const shared = {
  absWorkingDir: here,
  bundle: true,
  minify: true,
  outdir: out,
  logLevel: "warning",
  legalComments: "none",
};
const bundles = [
  {
    ...shared,
    entryPoints: { app: "src/main.tsx", style: "src/style.css" },
    format: "esm",
    splitting: true,
    chunkNames: "[name]",
    target: "es2022",
    jsx: "automatic",
    jsxImportSource: "preact",
  },
  {
    ...shared,
    entryPoints: { frame: "src/frames/output.ts", terminal: "src/frames/terminal.ts" },
    format: "iife",
    target: "es2022",
  },
];

await rm(out, { recursive: true, force: true });
await mkdir(out, { recursive: true });
for (const name of ["index.html", "still.html", "live.html", "terminal.html", "icon.svg"]) {
  await copyFile(`${here}static/${name}`, `${out}/${name}`);
}
await Promise.all(bundles.map((each) => build(each)));
