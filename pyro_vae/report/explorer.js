"use strict";
// The latent explorer: runs a decoder in the page, from the record that explorer.py writes.

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const UNIT = 100; // of the plane's drawing, per standard deviation of the prior
  const SLIDER_LIMIT = 4; // standard deviations; more if the points lie farther out

  const sigmoid = (v) => (v >= 0 ? 1 / (1 + Math.exp(-v)) : Math.exp(v) / (1 + Math.exp(v)));
  const ACTIVATIONS = { relu: (v) => (v > 0 ? v : 0), tanh: Math.tanh };

  function float32(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true)); // little-endian
  }

  /** A function from z, an array of latent_dim numbers, to the mean of p(x | z), an array of numbers. */
  function decoder(record) {
    const weights = float32(record.weights);
    const { kind, loc, scale } = record.mean;
    const mean = kind === "sigmoid" ? sigmoid : (v) => loc + scale * v;
    return (z) => {
      let input = Array.from(z, Number);
      if (input.length !== record.latent_dim) {
        throw new RangeError(`decode: expected ${record.latent_dim} numbers, found ${input.length}`);
      }
      let at = 0;
      for (const layer of record.layers) {
        const output = new Float64Array(layer.out);
        const bias = at + layer.in * layer.out;
        for (let row = 0; row < layer.out; row++) {
          let sum = weights[bias + row];
          for (let column = 0; column < layer.in; column++) sum += weights[at++] * input[column];
          output[row] = layer.activation ? ACTIVATIONS[layer.activation](sum) : sum;
        }
        at += layer.out; // past the bias
        input = output;
      }
      return Array.from(input, mean);
    };
  }

  /** Draw x, (channels, height, width), into a canvas of as many pixels; values beyond [0, 1] are clipped. */
  function draw(canvas, x, [channels, height, width]) {
    const image = new ImageData(width, height);
    const pixels = height * width;
    for (let i = 0; i < pixels; i++) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 * x[channels === 3 ? c * pixels + i : i]; // clamped, rounded
      image.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  /** A standard normal number (Box and Muller 1958). */
  const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

  const shape = (parent, name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  };

  function explorer(root) {
    const record = JSON.parse(root.querySelector("script").textContent);
    const decode = decoder(record);
    const find = (part) => root.querySelector(`[data-part=${part}]`);
    const [canvas, plane, readout, start] = ["image", "plane", "readout", "start"].map(find);
    const sliders = [...root.querySelectorAll("input[type=range]")];
    const selects = [...root.querySelectorAll("select[data-axis]")];
    const points = record.points ?? [];
    const z = new Array(record.latent_dim).fill(0);
    const reach = (dimension) => points.reduce((most, point) => Math.max(most, Math.abs(point[dimension])), 0);
    let axes = record.axes;
    let limit, handle;
    let drawn = true;
    const within = (value) => Math.min(limit, Math.max(-limit, value));

    function show() {
      drawn = true;
      draw(canvas, decode(z), record.shape);
      sliders.forEach((slider, i) => {
        slider.value = z[i];
        slider.setAttribute("aria-valuetext", z[i].toFixed(2));
        slider.nextElementSibling.textContent = z[i].toFixed(2);
      });
      if (plane) {
        const [across, up] = axes.map((i) => UNIT * within(z[i])); // a random draw may lie beyond the edge
        handle.setAttribute("transform", `translate(${across} ${-up})`);
      }
      const named = plane ? axes.map((i) => `z${i + 1} = ${z[i].toFixed(2)}`).join(", ") : `z1 = ${z[0].toFixed(2)}`;
      const length = z.length > 1 ? `; length of z: ${Math.hypot(...z).toFixed(2)}` : "";
      readout.textContent = named + length;
    }

    /** Set some dimensions of z; the image follows with the next frame. */
    function move(changes) {
      for (const [i, value] of Object.entries(changes)) z[i] = value;
      if (start) start.value = ""; // z is no longer at the selected start
      if (drawn) requestAnimationFrame(show);
      drawn = false;
    }

    function layOut() {
      limit = Math.max(3.5, ...axes.map((i) => 1.05 * reach(i)));
      const edge = UNIT * limit;
      plane.setAttribute("viewBox", `${-edge} ${-edge} ${2 * edge} ${2 * edge}`);
      plane.replaceChildren();
      for (const way of ["M-1 0H1", "M0 -1V1"]) {
        shape(plane, "path", { d: way, transform: `scale(${edge})`, class: "axis" });
      }
      for (const radius of [1, 2, 3]) shape(plane, "circle", { r: UNIT * radius, class: "prior" });
      points.forEach((point, i) => {
        const label = record.labels?.[i];
        shape(plane, "circle", {
          cx: UNIT * point[axes[0]],
          cy: -UNIT * point[axes[1]],
          r: 0.011 * edge,
          class: label === undefined ? "dot" : `dot c${label % 10}`,
        });
      });
      const size = { "font-size": 0.075 * edge };
      shape(plane, "text", { x: 0.97 * edge, y: -0.03 * edge, class: "end", ...size }).textContent = `z${axes[0] + 1}`;
      shape(plane, "text", { x: 0.03 * edge, y: -0.92 * edge, ...size }).textContent = `z${axes[1] + 1}`;
      handle = shape(plane, "g", { class: "handle" });
      shape(handle, "circle", { r: 0.06 * edge, class: "halo" });
      shape(handle, "circle", { r: 0.045 * edge, class: "grip" });
      plane.setAttribute("aria-label", `Latent plane of z${axes[0] + 1} and z${axes[1] + 1}: arrow keys or drag to move`);
    }

    if (plane) {
      const follow = (event) => {
        const { left, top, width, height } = plane.getBoundingClientRect();
        const across = (2 * (event.clientX - left)) / width - 1;
        const up = 1 - (2 * (event.clientY - top)) / height;
        move({ [axes[0]]: within(limit * across), [axes[1]]: within(limit * up) });
      };
      plane.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        plane.setPointerCapture(event.pointerId);
        follow(event);
      });
      plane.addEventListener("pointermove", (event) => {
        if (plane.hasPointerCapture(event.pointerId)) follow(event);
      });
      const ways = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowDown: [1, -1], ArrowUp: [1, 1] };
      plane.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.altKey || event.metaKey) return;
        if (event.key === "Home") {
          move({ [axes[0]]: 0, [axes[1]]: 0 });
        } else if (event.key in ways) {
          const [axis, sign] = ways[event.key];
          move({ [axes[axis]]: within(z[axes[axis]] + sign * (event.shiftKey ? 0.5 : 0.1)) });
        } else {
          return;
        }
        event.preventDefault(); // the page would scroll
      });
      selects.forEach((select, which) => {
        select.value = axes[which];
        select.addEventListener("change", () => {
          const chosen = Number(select.value);
          if (axes[1 - which] === chosen) axes = [axes[1], axes[0]]; // the axis of the other selector: swap them
          else axes = axes.map((axis, i) => (i === which ? chosen : axis));
          selects.forEach((each, i) => (each.value = axes[i]));
          layOut();
          show();
        });
      });
      layOut();
    }
    sliders.forEach((slider, i) => {
      slider.max = Math.max(SLIDER_LIMIT, Math.ceil(reach(i)));
      slider.min = -slider.max;
      slider.addEventListener("input", () => move({ [i]: Number(slider.value) }));
    });
    find("random").addEventListener("click", () => move(z.map(normal)));
    find("reset").addEventListener("click", () => move(z.map(() => 0)));
    start?.addEventListener("change", () => {
      const label = start.value;
      const chosen = points.filter((_, i) => String(record.labels[i]) === label);
      move(z.map((_, d) => chosen.reduce((sum, point) => sum + point[d], 0) / Math.max(1, chosen.length)));
      start.value = label;
    });
    root.hidden = false;
    show();
    return { decode, position: () => [...z] };
  }

  const all = [...document.querySelectorAll(".explorer")].map(explorer);
  if (all.length) window.pyroVaeExplorer = { ...all[0], all };
})();
