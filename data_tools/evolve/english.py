"""English: how edits are asked for."""

from data_tools.evolve.language import Language, Topic


def _any(words: str) -> str:
    """One of some words; a star stands for any ending."""
    return f"(?:{'|'.join(words.replace('*', '[a-z]*').split())})"


SHADE = r"(?:(?:light|dark|bright|deep|pale|hot|sky|royal|neon|pastel|rose|olive|navy)[- ])?"
COLOUR = SHADE + _any(
    "red orange yellow green blue purple violet white black pink brown gray grey gold golden silver beige cyan "
    "magenta turquoise teal crimson navy maroon lavender blond blonde"
)
MATERIAL = _any(
    "wood* glass marble stone granite metal* steel iron bronze copper brass chrome ceramic porcelain clay plastic "
    "rubber leather velvet silk cotton wool* denim paper cardboard crystal diamond jade ice chocolate wicker "
    "bamboo concrete brick lego fur feathers"
)
SCENE = _any(
    "beach sea ocean lake river forest woods jungle desert mountain* hill* meadow field grass garden park street "
    "road city town village castle kitchen office library room studio stadium circus space moon mars snow rain "
    "cave island farm zoo bridge rooftop market museum school underwater clouds paris tokyo london"
)
PERSON = _any(
    "he she him her them they man woman boy girl person people lady guy child kid baby bride groom men women couple"
)
FEATURE = _any(
    "face* hair hairstyle beard moustache mustache skin wrinkles freckles eyes eyebrows eyelashes lips nose "
    "cheeks teeth makeup make-up lipstick smile expression complexion acne dimples scar"
)
LETTERS = _any("text words? letters? lettering title caption headline slogan writing inscription label spelling sign")
QUOTED = r"^(?:the )?(?:\w+ )?['\"“‘][^'\"”’]+['\"”’]$"
FEELS = _any("smil* grin* laugh* cry* frown* wink*")
POSE = _any(
    "sit stand lie lay jump leap run walk wave raise lift lower open close smile grin laugh cry frown wink "
    "look(?=.(?:at|up|down|to|away|back|over|into|left|right)) face turn lean bend bow spread hold hug kiss eat "
    "drink sleep yawn dance fly swim climb clap point kick throw catch read ride play shake nod stretch kneel "
    "crouch squat cross fold stick bark growl roar sing shout fall roll spin reach touch scratch stare blink "
    r"float pose salute \w\w+ing"
)
NO_POSE = _any(
    "building painting drawing ceiling wedding king ring earring string thing something clothing living dining "
    "swimming spring morning evening wing lightning"
)
LIMB = _any(
    "heads? arms? hands? legs? wings? mouth eyes? tail body paws? door window book box umbrella gate curtains? lid"
)
STYLE = _any(
    "style* painting* painted watercolor watercolour cartoon* anime manga comic* pixel mosaic impression* cubis* "
    "ghibli disney pixar gogh monet picasso illustration render* claymation origami poly ukiyo-?e engraving "
    "etching crayon charcoal graffiti poster cyberpunk steampunk sketch* pencil drawing drawn"
)
TONE = _any(
    "night* dusk dawn sunset sunrise morning evening noon golden sunny sunlit cloudy overcast rain* fog* mist* "
    "storm* snow* winter* autumn* fall spring summer* warm* cool* cold* bright* dark* dim* contrast saturat* "
    "vibrant exposure vintage retro faded moody hdr cinematic tone* filter light* moonlight neon colou?r* "
    "monochrome gloomy sepia grayscale greyscale black.and.white"
)
PICTURE = _any("picture photo photograph image scene weather season sky lighting light mood time(?:.of.day)?")
WHOLE = rf"(?:it|this|day(?:time|light)?|everything|(?:the |this )?(?:whole |entire )?{PICTURE})"
BACKGROUND = r"(?:the |its |his |her )?(?:background|backdrop|scenery|surroundings|setting)"
THE = r"(?:the|this|that|these|those|his|her|its|their|all) "
ADD = _any("add put place insert draw include introduce attach hang write")
WHERE = r"(?:at|in|on|into|near|over|above|under|below|behind|beside|between|around|next to)"
SIDE = _any("top bottom left right cent(?:er|re) middle corner upper lower")
SHALL_BE = r"(?:should|must) (?:now )?(?:be|become|look|appear)(?: like)?"
TO = r"(?:(?:in)?to|with|for|by)"

ENGLISH = Language(
    polite=(
        r"^(?:(?:please|now|then|just|(?:can|could|would) you|i want you to|i(?:'d| would) like you to|let's),? )+"
        r"|,? please\??$|\?$"
    ),
    imperative=_any(
        "add adjust allow alter apply attach blur brighten bring build change clean clear close colou?r* convert "
        "correct cover cross cut darken decrease delete desaturate draw drag dress dye edit enhance enlarge erase "
        "exchange fill fix flip fold get give hang have hide include increase insert introduce let lift lower make "
        "modify morph move open paint place point put raise recolou?r redraw reduce relight remove render repaint "
        "replace reposition restore retouch rewrite rotate set sharpen shift show slide slim smooth* soften spread "
        "stretch substitute swap switch take tilt transform translate turn update use whiten wipe write"
    )
    + r"\b|.*\b(?:should|must) \w+",
    whole=(
        rf"(?:make|turn|convert|change|transform|render|show|draw|redraw|repaint|give|let|set) {WHOLE} <rest>",
        rf"{WHOLE} {SHALL_BE} <rest>",
        r"(?:convert|transform|turn|change|redraw|repaint|render) (?P<rest>(?:in)?(?:to|as) .+)",
        r"(?:apply|add|use) (?:an? |the |some )?(?P<rest>.*\b(?:tones?|filter|effect|style|look|lighting))\b.*",
        r"(?:change|turn) (?P<rest>(?:from )?(?:day|night|summer|winter|spring|autumn)\w* (?:in)?to [\w ]+)",
        r"(?P<rest>(?:remove all colou?r|desaturate|increase|decrease|reduce|enhance|brighten|darken|relight)\b.*)",
        r"(?P<rest>(?:in )?(?:the |an? )?(?:[\w-]+ ){0,3}(?:style|painting|sketch)(?: of [\w .-]+)?)",
        r"(?P<rest>black[- ]and[- ]white|gr[ae]yscale|sepia|anime)",
    ),
    looks={
        "grayscale": r"\b(?:gr[ae]y ?scale|black[- ]and[- ]white|monochrome|remove all colou?r|desaturate)\b",
        "sepia": r"\bsepia\b",
        "sketch": r"\b(?:pencil|sketch)\b|\bdrawing$",
        "night": r"^(?:(?:look like|in|to|into|at|be|a|it) ?)*night(?:time)?$",
        "snow": r"^(?:(?:look like|in|to|into|be|a|it) ?)*(?:snow|winter)$",
    },
    moods={"restyle": rf"\b{STYLE}\b", "retone": rf"\b{TONE}\b"},
    rules=(
        (
            "background",
            rf"(?:change|replace|set|swap|turn|switch|make) {BACKGROUND}(?: to be| {TO}| in)? <result>",
        ),
        ("background", rf"(?P<result>(?:blur|remove|erase|delete|clear) {BACKGROUND})"),
        ("background", rf"{BACKGROUND} {SHALL_BE} <result>"),
        ("background", r"put .*in front of <result>"),
        ("background", rf"make it look like \w+ (?:is|are) (?:in|on|at) (?P<result>.*\b{SCENE}\b.*)"),
        (
            "background",
            rf"(?:put|place|set|show) (?:{THE}[\w ]+?|him|her|them|it) (?:in|on|at|into|onto) "
            rf"(?P<result>(?:an? |the )?(?:[\w-]+ ){{0,2}}{SCENE})",
        ),
        (
            "pose",
            r"(?P<action>(?:turn|rotate|tilt|raise|lower|lift|open|close|cross|spread|fold|bend|stretch|stick|point) "
            rf"(?:out )?(?:{THE}|one ).*\b{LIMB}\b.*)",
        ),
        ("move", r"(?:move|shift|slide|drag|reposition) <subject> (?:in)?to <place>"),
        ("become", r"change the (?:material|texture) of <subject> (?:in)?to <material>"),
        ("become", r"change <subject>(?:'s)? (?:material|texture) (?:in)?to <material>"),
        ("become", rf"give <subject> an? (?P<material>{MATERIAL})(?: (?:texture|surface|finish|look))+"),
        (
            "replace",
            r"(?:change|edit|update|rewrite) <subject> (?:so it |to )(?:say|says|read|reads) <result>",
        ),
        ("replace", r"(?:replace|swap|substitute|exchange) <subject> (?:with|for|by) <result>"),
        ("recolour", r"change the colou?r of <subject> to (?P<result>[\w -]+)"),
        ("recolour", r"change <subject>(?:'s)? colou?r to (?P<result>[\w -]+)"),
        ("recolour", r"(?:recolou?r|paint|colou?r|dye) <subject> (?:to |in )(?P<result>\w+)"),
        (
            "recolour",
            r"(?:turn|make|change|paint|colou?r|dye) <subject>"
            rf"(?: from {COLOUR})? (?:to |into )?(?P<result>{COLOUR})",
        ),
        ("recolour", rf"<subject> {SHALL_BE} (?P<result>{COLOUR})"),
        (
            "become",
            r"(?:make|build|turn|transform) <subject> (?:to )?(?:be )?(?:made |out )+of <material>",
        ),
        (
            "pose",
            rf"(?:make|let|have|get) (?P<subject>(?:(?!look)\w+ )+?)(?:to )?(?P<action>(?:be )?{POSE}\b(?! like).*)",
        ),
        ("pose", rf"<subject> (?:should|must) (?P<action>(?:be )?{POSE}\b.*)"),
        ("become", rf"(?:make|turn) <subject> into (?P<result>(?:[\w-]+ )?{MATERIAL})"),
        ("replace", r"(?:turn|change|transform|convert|make|morph) <subject> (?:in)?to <result>"),
        ("remove", rf"take (?P<subject>(?!away|off).+?) (?:off|out of|away from) {THE}.+"),
        ("remove", r"(?:remove|erase|delete|take away|take off|get rid of|clean up|wipe off|hide) <subject>"),
        ("add", r"dress <owner> in <subject>"),
        (
            "add",
            rf"give (?P<owner>(?:{THE}|an? )[\w-]+(?= (?:an?|the|some|two) )|{PERSON}|it|{THE}[\w-]+) <subject>",
        ),
        ("add", rf"{ADD} <subject> (?:at|in|on|to|into|near) (?P<place>{THE}?(?:\w+[- ])?{SIDE}\b.*)"),
        ("add", rf"{ADD} <subject> (?:to|onto) <owner>"),
        ("add", rf"{ADD} <subject> (?P<where>{WHERE} .+)"),
        ("add", rf"{ADD} <subject>"),
        ("become", r"(?:make|have|let) <subject> (?:look(?: like)?|appear|seem) <result>"),
        ("other", r"(?P<subject>(?:whiten|smooth\w*|retouch|soften|slim) .+)"),
        ("become", rf"make (?P<subject>(?:{THE})?(?:[\w-]+'s )?[\w-]+(?: (?:of|in|on) {THE}\w+)?) <result>"),
        ("add", rf"(?:have there|there should) be <subject> (?P<where>{WHERE} .+)"),
        ("replace", r"let <subject> be replaced by <result>"),
        ("replace", rf"<subject> {SHALL_BE} (?P<result>an? .+)"),
        ("become", rf"<subject> {SHALL_BE} <result>"),
    ),
    topics=(
        Topic("text", "subject", rf"\b{LETTERS}\b|{QUOTED}"),
        Topic("portrait", "action", rf"\b{FEELS}\b"),
        Topic("portrait", "subject", rf"\b{FEATURE}\b"),
        Topic("portrait", "subject", rf"\b{PERSON}\b", ("become",)),
        Topic("material", "material", "."),
        Topic("material", "result", rf"\b(?:made|out) of\b|\b(?:texture|finish)$|^(?:[\w-]+ )?{MATERIAL}(?: one)?$"),
        Topic("material", "result", rf"\b{MATERIAL} (?:statue|sculpture|figure|one)$"),
    ),
    described=(
        Topic("add", "subject", r"\bwearing\b"),
        Topic("other", "subject", r"^(?:what|how|why|imagine)\b"),
        Topic("motion", "subject", rf"\b(?!{NO_POSE}\b)\w\w+ing\b|\b(?:crossed|thumbs|open|closed|from behind)\b"),
        Topic("style", "subject", rf"\b{STYLE}\b"),
        Topic("background", "subject", rf"\b(?:in|on|at|under|by) (?:an? |the )?(?:[\w-]+ ){{0,2}}{SCENE}\b"),
        Topic("tone", "subject", rf"\b(?:at|in|during|on) (?:an? |the )?(?:\w+ )?{TONE}\b"),
        Topic("add", "subject", r"\bwith (?:an?|some|two) "),
        Topic("material", "subject", rf"\bmade (?:out )?of {MATERIAL}\b"),
    ),
    tidy=(
        ("place", r"^(?:the|its|his|her)\s+", ""),
        ("place", r"\s+(?:corner|side|edge|of the (?:picture|image|photo))\b.*$", ""),
        ("place", r"\b(?:center|middle)\b", "centre"),
        ("subject", r"^the\b", "the"),
        ("subject", r"^him$", "he"),
        ("subject", r"^her$", "she"),
        ("subject", r"^them$", "they"),
        ("result", r"^(?:to|into|in|as|to look like|look like|looks?|be|to be)\s+", ""),
    ),
)
