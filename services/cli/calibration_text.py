"""What `calibrate-kv` reads when it is given no text: prose, talk, code, tables, numbers and other languages.

Written for this purpose. Scales follow the largest key and value of a layer, which depend on kinds of text more than on
its amount, so a little of many kinds is here.
"""

TEXT = """\
The harbour was quiet in the early morning. Nets hung from the rails, and a cat walked along the wall as if it owned
every boat. Old Marit, who had mended sails for fifty years, said that the wind would turn before noon; she was seldom
wrong, and nobody liked to tell her when she was. By eleven the flags pointed inland, the water grew dark, and the
ferry blew its horn three times, which meant that it would not leave until the next day.

"How long will it take?" asked the boy.
"That depends," said the engineer. "If the pump holds, two hours. If it does not, we shall need another pump, and the
nearest one is in a town that I have never been to."
"Then I will wait," said the boy, and he sat down on the steps with his book.

Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. In the first stage, chlorophyll in the
thylakoid membranes absorbs photons and passes their energy on to electrons; in the second, the Calvin cycle spends
that energy to fix carbon. About 1 to 2 percent of the sunlight that falls on a field ends up in its plants. The
equation is usually written 6 CO2 + 6 H2O -> C6H12O6 + 6 O2.

In 1687 Isaac Newton published the Principia, which states that every body attracts every other with a force that is
proportional to the product of their masses and inversely proportional to the square of the distance between them.
Two hundred and twenty-eight years later Albert Einstein described gravity as the curvature of space and time.

<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
Give me three reasons to learn a musical instrument, each in one sentence.<|im_end|>
<|im_start|>assistant
1. It trains patience, because progress comes from many small repetitions.
2. It brings people together, since most music is made with others or for them.
3. It gives you a language for what is hard to say in words.<|im_end|>

Subject: Meeting on Thursday
Dear colleagues,
please note that the meeting about the new building has been moved to Thursday, 14 March 2024, at 10:30 in room B-207.
Bring your estimates (in EUR, without VAT) and a list of open questions. If you cannot come, write to
j.keller@example.org or call +49 30 5550 1234 before Wednesday evening.
Kind regards, Johanna Keller

def quicksort(values: list[int]) -> list[int]:
    if len(values) <= 1:
        return values
    pivot, *rest = values
    smaller = [v for v in rest if v < pivot]
    larger = [v for v in rest if v >= pivot]
    return quicksort(smaller) + [pivot] + quicksort(larger)

#include <stdio.h>
int main(int argc, char **argv) {
  for (int i = 0; i < argc; ++i) printf("%d: %s\\n", i, argv[i]);
  return argc > 3 ? 1 : 0;
}

SELECT c.name, SUM(o.total) AS revenue FROM customers c JOIN orders o ON o.customer_id = c.id
WHERE o.created_at BETWEEN '2023-01-01' AND '2023-12-31' GROUP BY c.name HAVING SUM(o.total) > 1000
ORDER BY revenue DESC;

{"id": 48151, "status": "shipped", "items": [{"sku": "AX-77", "qty": 3, "price": 12.95}, {"sku": "QR-04", "qty": 1,
"price": 249.0}], "address": {"street": "12 Elm Road", "city": "Leeds", "zip": "LS1 4AP"}, "express": false}

| year | population | change | area (km2) |
|------|-----------:|-------:|-----------:|
| 1990 |  1,204,331 |        |     412.70 |
| 2000 |  1,188,059 |  -1.4% |     412.70 |
| 2010 |  1,301,442 |  +9.5% |     415.12 |
| 2020 |  1,466,903 | +12.7% |     415.12 |

Theorem. There are infinitely many prime numbers.
Proof. Suppose that p1, p2, ..., pn are all of them, and let N = p1 * p2 * ... * pn + 1. No pi divides N, since it would
leave the remainder 1. But N > 1 has a prime divisor, which is therefore not in the list: a contradiction.

3.14159265358979323846 2.71828182845904523536 1.61803398874989484820 0.57721566490153286061
17 x 23 = 391; 391 / 17 = 23; 2^10 = 1024; sqrt(144) = 12; 0.1 + 0.2 = 0.3

Le marché ouvre à sept heures. On y trouve des pommes, du fromage de brebis et, quand la saison s'y prête, des
champignons que personne n'achète sans demander d'où ils viennent.
Der Zug hält nicht mehr an jedem Bahnhof, aber der Schaffner kennt noch alle Namen und sagt sie leise vor sich hin.
La biblioteca cierra a las ocho; los libros que nadie ha pedido vuelven solos a sus estantes, o eso dicen los niños.
Вечером снег перестал, и над рекой стало видно столько звёзд, что собака остановилась и долго смотрела вверх.
春になると、山の雪がとけて川の水が冷たくなる。子どもたちは橋の上から紙の舟を流して、海まで届くかどうか話し合う。
图书馆门前的老树每年秋天落下金黄的叶子，学生们把它们夹在书里，到了冬天才发现。

Ingredients: 250 g flour, 2 eggs, 1/2 litre of milk, a pinch of salt, 30 g butter. Whisk the eggs into the milk, add the
flour little by little, and let the batter rest for 30 minutes. Melt some butter in a pan over medium heat; a ladle of
batter makes one pancake. Turn it when its edge lifts by itself.

O moon above the empty street,
you count the windows and the feet
of those who hurry home too late;
you keep their secrets, and you wait.

WARNING 2024-02-29T23:59:58.120Z worker-3 retry 2/5: connection to 10.0.4.17:6379 refused (errno 111)
ERROR   2024-02-29T23:59:59.004Z worker-3 job 7f3a9c1e failed: Traceback (most recent call last): KeyError: 'user_id'
https://example.org/articles/2024/why-we-sleep?utm_source=news&ref=17#section-3

The committee recommends that (a) the existing rules remain in force until 31 December; (b) exceptions be granted only
in writing; and (c) the fees listed in Annex II be raised by no more than 2.5 per cent. Members who disagree may submit
a dissenting opinion within fourteen days, which shall be published together with this report.
"""
