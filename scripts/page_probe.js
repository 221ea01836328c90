// Runs inside a page and reports what is wrong with it to the window around it; see example_pages.py.
(async () => {
  const problems = [];
  const scroller = document.scrollingElement;
  if (scroller.scrollWidth > innerWidth + 1) problems.push(`the page is ${scroller.scrollWidth} px wide, the screen ${innerWidth}`);

  // The part of a box that its scrolling ancestors show; null if nothing is visible.
  const shown = (rect, element) => {
    let box = { left: rect.left, right: rect.right, top: rect.top, bottom: rect.bottom };
    for (let parent = element; parent && parent !== document.body; parent = parent.parentElement) {
      if (getComputedStyle(parent).overflow === "visible" || parent.ownerSVGElement) continue;
      const outer = parent.getBoundingClientRect();
      box = { left: Math.max(box.left, outer.left), right: Math.min(box.right, outer.right),
              top: Math.max(box.top, outer.top), bottom: Math.min(box.bottom, outer.bottom) };
    }
    return box.right - box.left > 1 && box.bottom - box.top > 1 ? box : null;
  };
  const short = (text) => JSON.stringify(text.trim().slice(0, 40));

  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || ["SCRIPT", "STYLE", "TITLE"].includes(parent.tagName) || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const inSvg = parent.ownerSVGElement;
    const turned = inSvg && /rotate\((?!-?0\b|-?90\b)/.test(parent.closest("[transform]")?.getAttribute("transform") ?? "");
    const boxes = inSvg ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    for (const rect of boxes) {
      const box = shown(rect, parent);
      if (box) texts.push({ box, text: node.data, parent, inSvg, turned });
      if (inSvg) {
        const frame = inSvg.getBoundingClientRect();
        const beyond = Math.max(frame.left - rect.left, rect.right - frame.right, frame.top - rect.top, rect.bottom - frame.bottom);
        if (beyond > 2) problems.push(`${short(node.data)} is cut off by ${beyond.toFixed(0)} px`);
        if (rect.height < 8 && !turned) problems.push(`${short(node.data)} is ${rect.height.toFixed(0)} px high`);
      }
    }
  }
  for (let i = 0; i < texts.length; i++) {
    for (let j = i + 1; j < texts.length; j++) {
      const [a, b] = [texts[i], texts[j]];
      if (a.parent === b.parent || a.turned || b.turned || a.parent.closest("thead") || b.parent.closest("thead")) continue;
      const width = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const height = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      const least = Math.min(a.box.bottom - a.box.top, b.box.bottom - b.box.top);
      if (width > 2 && height > 0.35 * least) problems.push(`${short(a.text)} and ${short(b.text)} overlap`);
    }
  }

  // Contrast of texts in figures; that of other texts is axe-core's.
  const channels = (colour) => (colour.match(/[\d.]+/g) ?? []).map(Number);
  const luminance = (colour) => channels(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((m, n) => n - m); return (x + 0.05) / (y + 0.05); };
  for (const { text, parent, inSvg } of texts) {
    if (!inSvg) continue;
    const ratio = contrast(getComputedStyle(parent).fill, getComputedStyle(parent.closest("section") ?? document.body).backgroundColor);
    if (ratio < 4.5) problems.push(`${short(text)} has a contrast of ${ratio.toFixed(1)}`);
  }

  if (typeof axe !== "undefined") {
    const result = await axe.run(document, { resultTypes: ["violations"] });
    for (const violation of result.violations) {
      for (const node of violation.nodes.slice(0, 3)) problems.push(`axe ${violation.id}: ${node.html.slice(0, 90)}`);
    }
  }
  parent.postMessage(JSON.stringify({ height: scroller.scrollHeight, problems: [...new Set(problems)] }), "*");
})();
