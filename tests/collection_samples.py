"""Small judged collections, written as they are handed round."""

import json

SMART = {
    "x.ALL": ".I 1\n.T\nThe river\n.A\nSomebody\n.W\nflows to\nthe sea.\n.X\n1\t2\n.I 2\n.T\nStones\n.W\nlie still.\n",
    "x.QRY": ".I 1\n.W\nWhat flows?\n.I 2\n.W\nWhat lies?\n",
    "x.REL": "     1      1 0 0.0\n     2      2 0 0.0\n",
}


def write_smart(folder):
    for name, text in SMART.items():
        (folder / name).write_text(text)
    return folder / "x.ALL"


def write_beir(folder):
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": "d1", "title": "River", "text": "to the sea"}, {"_id": "d2", "title": "", "text": "stones"}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "water"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return folder
