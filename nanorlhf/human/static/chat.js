"use strict"
let labeler = "", about = null, talk = [], busy = false

function say(words) {
  box($("talk"), "section", "said", "You", words)
  return ask([...talk, {role: "user", content: words}])
}
// Replies, each {id, text, card}, to a conversation; whether it goes on with one of them
async function ask(messages) {
  busy = $("send").disabled = true
  document.querySelector("#again")?.remove()
  const row = make("div", $("talk"), "", {className: "replies"})
  const order = about.models === 2 && Math.random() < 0.5 ? [1, 0] : [...Array(about.models).keys()]
  const replies = order.map((model, i) =>
    ({model, card: box(row, "article", "card", about.models === 2 ? `Reply ${i + 1}` : "Reply", "…")}))
  const done = await Promise.all(replies.map(reply => listen(reply, messages)))
  busy = $("send").disabled = false
  if (!done.every(Boolean)) return false
  const n = replies[0].n_read, end = messages.length, below = make("div", $("talk"), "", {className: "row"})
  if (n < end) row.before(make("p", $("talk"), n === 1 ? "Of this conversation only your last words were read."
    : `Of this conversation only the last ${n} messages were read.`, {className: "soft"}))
  talk = [...messages, {role: "assistant", content: replies[0].text}]
  for (const {id, card} of replies) choice([id], [[card.lastChild, "Like", true], [card.lastChild, "Dislike", false]])
  if (replies.length === 2) choice(replies.map(reply => reply.id),
    [...replies.map(({card}, i) => [card.lastChild, "This one is better", i]), [below, "Tie", -1]],
    i => { if (i >= 0 && talk[end]?.content === replies[1 - i].text) talk[end].content = replies[i].text })  // it goes on
  make("button", below, "Another answer", {type: "button", id: "again", onclick: () => busy || ask(messages)})
  return true
}
function box(parent, tag, className, name, text) {
  const node = make(tag, parent, "", {className, "aria-label": name})
  make("h2", node, name)
  said(node, text)
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
      reply.text = all.slice(all.indexOf("\n") + 1)
      shown.textContent = visible(reply.text)
      reply.card.scrollIntoView({block: "nearest"})
    }
    reply.id = all.slice(0, all.indexOf("\n"))
    reply.n_read = Number(answer.headers.get("Messages-Read"))
    shown.textContent ||= "(it says nothing)"
    return true
  } catch (error) {
    shown.textContent = "(no reply)"
    $("alert").textContent = error.message || String(error)
    return false
  }
}
function choice(ids, options, then = () => {}) {  // [row, label, answer]: one, or by a second click none
  const buttons = options.map(([row, label, value]) =>
    [make("button", row, label, {type: "button", "aria-pressed": false}), value])
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
call("/api/about").then(found => {
  about = found
  if (about.status !== 200) return $("alert").textContent = about.error
  $("temperature").value = $("degrees").textContent = about.temperature
  $("kept").textContent = ` What you judge is kept there, in ${about.to.join(" and ")}.`
  signIn(name => { labeler = name; $("say").hidden = false; $("words").focus() })
})
