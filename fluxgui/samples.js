
// Samples of a run: a click shows one large, over an earlier one of the same prompt; a slider uncovers either.
(() => {
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const show = (clicked) => {
    const grid = clicked.closest(".samples");
    const words = grid.dataset;
    const same = [...grid.querySelectorAll(`a[data-index="${clicked.dataset.index}"]`)]
      .sort((a, b) => a.dataset.step - b.dataset.step);
    const dialog = make("dialog", {className: "sample-large"});
    const after = make("img", {src: clicked.href, alt: clicked.querySelector("img").alt});
    const before = make("img", {className: "before", alt: ""});
    const stage = make("div", {className: "stage"}, after, before);
    const caption = make("p", {textContent: `${words.step} ${clicked.dataset.step}: ${clicked.title}`});
    const close = make("button", {type: "button", textContent: words.close, className: "close"});
    close.onclick = () => dialog.close();
    const controls = make("div", {className: "controls"});
    const others = same.filter((a) => a !== clicked);
    if (others.length) {
      const slider = make("input", {type: "range", min: 0, max: 100, value: 50, ariaLabel: words.slider});
      const choose = make("select", {ariaLabel: words.before},
        ...others.map((a) => make("option", {value: a.href, textContent: `${words.before}: ${words.step} ${a.dataset.step}`})));
      const uncover = () => { before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; };
      const change = () => { before.src = choose.value; };
      slider.oninput = uncover;
      choose.onchange = change;
      uncover();
      change();
      controls.append(slider, choose);
    } else {
      before.remove();
    }
    controls.append(close);
    dialog.append(stage, caption, controls);
    dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
    dialog.onclose = () => { dialog.remove(); clicked.isConnected && clicked.focus(); };
    document.body.append(dialog);
    dialog.showModal();
  };
  document.addEventListener("click", (event) => {
    const clicked = event.target.closest && event.target.closest("a[data-large]");
    if (!clicked || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(clicked);
  });
})();
