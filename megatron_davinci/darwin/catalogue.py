"""All steps that a recipe can name, by level."""

from __future__ import annotations

from megatron_davinci.darwin import (
    checked,
    code_rules,
    complete,
    contextualise,
    converse,
    decontaminate,
    exact,
    formats,
    gopher,
    licences,
    near,
    normalise,
    pairs,
    pieces,
    pii,
    rate,
    refine,
    related,
    rules,
    sampled,
    scanned,
    selection,
    web_rules,
)
from megatron_davinci.darwin.step import Step

LEVELS = {
    0: "acquisition",
    1: "normalisation to text, nothing filtered",
    2: "rules: deterministic, explainable",
    3: "selection by light models, text untouched",
    4: "refinement by a model, faithful: nothing added",
    5: "completion by a model: what is implicit made explicit",
    6: "context: made to stand alone, out of related documents, cited",
    7: "environment: code with checks that were run, hold, and can fail",
    8: "ecosystem: what models say to each other about a document, judged by another",
}

STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (
        normalise.ExtractHtml,
        formats.ExtractPdf,
        scanned.OcrPdf,
        formats.ExtractNotebook,
        formats.ExtractLatex,
        formats.ExtractThread,
        normalise.NormaliseText,
        rules.Length,
        rules.Garble,
        rules.Language,
        licences.FindLicence,
        licences.Licence,
        pii.Pii,
        gopher.GopherQuality,
        gopher.GopherRepetition,
        web_rules.C4,
        web_rules.FineWeb,
        code_rules.CodeQuality,
        code_rules.Stars,
        exact.ExactDedup,
        near.MinhashDedup,
        pieces.DedupPieces,
        decontaminate.Decontaminate,
        selection.Classify,
        selection.SelectTop,
        rate.Rate,
        refine.Refine,
        complete.Complete,
        pairs.WritePairs,
        sampled.SampleAnswers,
        related.Relate,
        contextualise.Contextualise,
        checked.WriteChecks,
        converse.Converse,
    )
}
