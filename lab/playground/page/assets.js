"use strict";
// Binary files. A page opened from disk may not fetch anything, so scripts carry them, as base64 of gzip.
const assets = (() => {
  const requested = new Map();

  async function unpack(base64) {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  return {
    // Return the bytes of an asset: its script is added to the page, and removed when it has called `put`.
    get(name) {
      return new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `${name}.js`;
        script.onload = () => script.remove();
        script.onerror = () => reject(new Error(`${name}.js is missing: keep all files of the folder together`));
        requested.set(name, base64 => unpack(base64).then(resolve, reject));
        document.head.append(script);
      });
    },
    put(name, base64) {
      requested.get(name)(base64);
      requested.delete(name);
    },
  };
})();
