"use strict"
let labeler = "", about = null, talk = [], busy = false

// One turn: what was said before it, and its replies, each {id, text, card}
async function say(words) {
  busy = $("send").disabled = true
  const messages = [...about.keeps_turns ? talk : [], {role: "user", content: words}]
  box($("talk"), "section", "said", "You", words)
  const row = make("div", $("talk"), "", {className: "replies"})
  const order = about.models === 2 && Math.random() < 0.5 ? [1, 0] : [...Array(about.models).keys()]
  const replies = order.map((model, i) =>
    ({model, card: box(row, "article", "card", about.models === 2 ? `Reply ${i + 1}` : "Reply", "…")}))
  const done = await Promise.all(replies.map(reply => listen(reply, messages)))
  busy = $("send").disabled = false
  if (!done.every(Boolean)) return false
  talk = [...messages, {role: "assistant", content: replies[0].text}]
  const end = talk.length - 1
  for (const {id, card} of replies) choice([id], [[card, "Like", true], [card, "Dislike", false]])
  if (replies.length === 2) choice(replies.map(reply => reply.id),
    replies.map(({card}, i) => [card, "This one is better", i]),
    i => { if (talk[end]?.content === replies[1 - i].text) talk[end].content = replies[i].text })  // it goes on
  return true
}
function box(parent, tag, className, name, text) {
  const node = make(tag, parent, "", {className, "aria-label": name})
  make("h2", node, name)
  make("div", node, text, {className: "text"})
  if (tag === "article") make("div", node, "", {className: "row"})
  return node
}
async function listen(reply, messages) {  // the first line is the id, then comes the text
  const shown = reply.card.querySelector(".text")
  try {
    const answer = await send("/api/reply", {messages, model: reply.model, temperature: Number($("temperature").value)})
    if (!answer.ok) throw Error((await answer.json()).error)
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
    let all = ""
    for (let part; !(part = await reader.read()).done;) {
      all += part.value
      shown.textContent = all.slice(all.indexOf("\n") + 1)
      reply.card.scrollIntoView({block: "nearest"})
    }
    reply.id = all.slice(0, all.indexOf("\n"))
    reply.text = shown.textContent
    shown.textContent ||= "(it says nothing)"
    return true
  } catch (error) {
    shown.textContent = "(no reply)"
    $("alert").textContent = error.message || String(error)
    return false
  }
}
function choice(ids, options, then = () => {}) {  // [card, label, answer]: one, or by a second click none
  const buttons = options.map(([card, label, value]) =>
    [make("button", card.lastChild, label, {type: "button", "aria-pressed": false}), value])
  let last = -Infinity
  for (const [button, value] of buttons) button.onclick = async () => {
    if (performance.now() - last < 400) return  // the second click of two
    last = performance.now()
    const answer = button.getAttribute("aria-pressed") === "true" ? null : value
    const kept = await call("/api/judge", {labeler, ids, answer})
    $("alert").textContent = kept.status === 200 ? "" : kept.error
    if (kept.status !== 200) return
    for (const [other, its] of buttons) other.setAttribute("aria-pressed", its === answer)
    if (answer !== null) then(answer)
  }
}
$("say").onsubmit = async event => {
  event.preventDefault()
  const words = $("words").value
  if (busy || !words.trim()) return
  $("words").value = $("alert").textContent = ""
  if (!await say(words)) $("words").value ||= words
  $("words").focus()
}
$("words").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), $("say").requestSubmit()
}
$("temperature").oninput = () => { $("degrees").textContent = $("temperature").value }
$("clear").onclick = () => { if (!busy) talk = [], $("talk").replaceChildren() }
signIn(async name => {
  labeler = name
  about = await call("/api/about")
  if (about.status !== 200) return $("alert").textContent = about.error
  $("temperature").value = $("degrees").textContent = about.temperature
  $("to").textContent = about.to.join(" and ")
  $("say").hidden = false, $("words").focus()
})
