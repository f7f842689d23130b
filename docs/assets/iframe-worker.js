// Browsers start no workers for pages that come from files, and the theme searches in one. There, its script runs in a
// hidden frame instead. The theme's plugin `offline` takes this for the shim that it would fetch, by its name.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside = new Promise((loaded) => {
        const element = inside.document.createElement("script");
        element.src = script;
        element.onload = () => loaded(inside);
        inside.document.body.append(element);
      });
    }
    postMessage(data) {
      this.inside.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
