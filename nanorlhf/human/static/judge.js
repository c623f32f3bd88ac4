"use strict"
const TITLES = {comparisons: "Which reply is better?", rankings: "Rank the replies, the best first",
  ratings: "How good is each reply, from 0 to 5?", thumbs: "Do you like each reply?"}
const HELP = {comparisons: "",
  rankings: "type the numbers of the replies, the best first, <=> before one as good as the last, <Backspace> back, <Enter> done",
  ratings: "<0> to <5> rate the outlined reply, <↑> <↓> move, <Enter> done",
  thumbs: "<l> like, <d> dislike the outlined reply, <↑> <↓> move, <Enter> done"}
let labeler = "", question = null, given = [], current = 0, tie = false, busy = false, since = 0, times = []

async function next() {
  const found = await call("/api/next?labeler=" + encodeURIComponent(labeler))
  if (found.status === 400) $("enter").hidden = false  // no name that can be kept
  if (found.status !== 200 && !found.done) return $("alert").textContent = found.error
  const {answered, total} = found.progress
  Object.assign($("bar"), {value: answered, max: total || 1})
  const each = times.length ? `, ${(times.reduce((a, b) => a + b) / times.length).toFixed(1)} s each` : ""
  $("status").textContent = `${answered} of ${total}${each}`
  question = found.done ? null : found
  current = 0, tie = false, since = performance.now()
  given = Array(question ? question.responses.length : 0).fill(null)
  draw()
  $("title").focus()
}
function draw() {
  const buttons = () => [...document.querySelectorAll("main button")]
  const focused = buttons().indexOf(document.activeElement)  // drawing anew would lose it
  redraw()
  buttons()[focused]?.focus()
}
function redraw() {
  for (const id of ["prompt", "replies", "actions", "help"]) $(id).replaceChildren()
  $("prompt").hidden = !question
  $("guide").hidden = !question?.guidelines
  $("title").textContent = question ? TITLES[question.kind] : "Nothing is left to judge. Thank you!"
  if (!question) return action("Undo <u>", undo)
  const kind = question.kind, turns = question.messages || [{role: "user", content: question.prompt}]
  $("guidelines").textContent = question.guidelines
  for (const turn of turns) make("h2", $("prompt"), turn.role), said($("prompt"), turn.content)
  question.responses.forEach((text, i) => reply(kind, text, i))
  if (kind === "comparisons") action("Tie <t>", () => answer(-1))
  else action("Done <Enter>", submit, {className: "main", disabled: given.includes(null)})
  if (kind === "rankings") action("Start over", () => { given.fill(null); tie = false; draw() })
  action("Skip <s>", () => answer(null))
  action("Undo <u>", undo)
  withKeys($("help"), HELP[kind])
}
function action(label, click, set = {}) {
  withKeys(make("button", $("actions"), "", {type: "button", onclick: click, ...set}), label)
}
function reply(kind, text, i) {
  const card = make("article", $("replies"), "", {className: "card", "aria-label": `Reply ${i + 1}`})
  make("h2", card, `Reply ${i + 1}`)
  said(card, text || "(it says nothing)")
  const row = make("div", card, "", {className: "row", role: "group", "aria-label": `Reply ${i + 1}`})
  const option = (label, click, pressed, name, full) => withKeys(make("button", row, "", {type: "button",
    onclick: click, "aria-pressed": pressed, className: full ? "main" : "", ...name && {"aria-label": name}}), label)
  if (kind === "comparisons") option(`Reply ${i + 1} is better <${i + 1}>`, () => answer(i), false)
  if (kind === "rankings") option(given[i] ? `Rank ${given[i]}` : `Next best <${i + 1}>`, () => rank(i), given[i] !== null)
  if (kind === "ratings") for (let s = 0; s <= 5; s++)
    option(s ? "★" : "0", () => set(i, s), given[i] === s, `${s} of 5 stars`, s && s <= given[i])
  if (kind === "thumbs") for (const [label, value] of [["Like", true], ["Dislike", false]])
    option(label, () => set(i, value), given[i] === value)
  if (kind === "ratings" || kind === "thumbs") card.classList.toggle("current", i === current)
}
function set(i, value) {  // and go on to the next that has none
  given[i] = value
  const rest = given.map((_, k) => (i + 1 + k) % given.length)
  current = rest.find(k => given[k] === null) ?? i
  draw()
}
function rank(i) {
  if (given[i] !== null || i >= given.length) return
  const ranked = given.filter(r => r !== null), last = Math.max(...ranked)
  given[i] = tie && ranked.length ? last : ranked.length + 1
  tie = false
  draw()
}
function unrank() {
  const last = Math.max(...given.filter(r => r !== null))
  given = given.map(r => r === last ? null : r)
  draw()
}
const submit = () => given.includes(null) || answer(given)
const answer = value => give("/api/answer", {id: question.id, labeler, answer: value}, true)
const undo = () => give("/api/undo", {labeler}, false)
async function give(path, body, is_answer) {
  if (busy || performance.now() - since < 300) return  // the second click of two
  busy = true
  const reply = await call(path, body)
  busy = false
  $("alert").textContent = reply.status === 200 || reply.status === 409 && is_answer ? "" : reply.error
  if (reply.status === 200 && is_answer) times.push((performance.now() - since) / 1000)
  if (reply.status === 200 || reply.status === 409) await next()  // 409: given in another tab
  if (reply.undone) $("status").textContent += `. Taken back: ${reply.answer}`
}
addEventListener("keydown", event => {
  const key = event.key, by_hand = event.repeat || event.ctrlKey || event.metaKey || event.altKey
  if (by_hand || event.target.tagName === "INPUT" || busy || !labeler || !question && key !== "u") return
  if (key === "u") return undo()
  const kind = question.kind, digit = /^[0-9]$/.test(key) ? Number(key) : -1
  const keys = {s: () => answer(null)}
  if (kind === "comparisons") Object.assign(keys, {1: () => answer(0), 2: () => answer(1), t: () => answer(-1)})
  else if (!["BUTTON", "SUMMARY"].includes(event.target.tagName)) keys.Enter = submit
  if (kind === "rankings") Object.assign(keys, {"=": () => { tie = true }, Backspace: unrank},
    digit > 0 && {[key]: () => rank(digit - 1)})
  if (kind === "ratings" && digit >= 0 && digit <= 5) keys[key] = () => set(current, digit)
  if (kind === "thumbs") Object.assign(keys, {l: () => set(current, true), d: () => set(current, false)})
  const move = step => () => { current = (current + step + given.length) % given.length; draw() }
  if ((kind === "ratings" || kind === "thumbs") && event.target.id !== "prompt")
    Object.assign(keys, {ArrowUp: move(-1), ArrowDown: move(1)})
  if (keys[key]) event.preventDefault(), keys[key]()
})
signIn(name => { labeler = name; next() })
