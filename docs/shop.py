"""Writes the example of the README: `log.csv`, what made-up customers bought, and `products.csv`.

    python docs/shop.py

Each customer likes two of eight shelves, and takes other products by chance now and then.
"""

import csv
import datetime
import random

SHELVES = {
    "tea": "green tea,black tea,oolong,chai,mint tea,matcha,rooibos,teapot",
    "coffee": "espresso,filter coffee,cold brew,coffee filters,oat milk,milk,biscotti,mug",
    "baking": "flour,yeast,sugar,butter,eggs,vanilla,baking paper,chocolate",
    "pasta": "spaghetti,penne,tomatoes,basil,parmesan,olive oil,garlic,pesto",
    "breakfast": "granola,yoghurt,honey,bananas,berries,jam,toast,orange juice",
    "curry": "rice,coconut milk,curry paste,ginger,chili,lentils,coriander,naan",
    "cleaning": "soap,sponges,detergent,bin bags,bleach,brush,kitchen roll,gloves",
    "garden": "tomato seeds,compost,pots,watering can,basil seeds,rake,twine,bulbs",
}
CUSTOMERS = 600


def main() -> None:
    """Writes both files into the working directory."""
    draw = random.Random(7)
    shelf_of = {name: shelf for shelf, names in SHELVES.items() for name in names.split(",")}
    with open("products.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["product", "shelf", "price"])
        for name, shelf in shelf_of.items():
            rows.writerow([name, shelf, f"{draw.uniform(1, 9):.2f}"])
    with open("log.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "product", "when"])
        for number in range(CUSTOMERS):
            user = "ann" if number == 0 else "bob" if number == 1 else f"user {number}"
            liked = draw.sample(sorted(SHELVES), 2)
            for day in sorted(draw.sample(range(1, 181), draw.randint(8, 16))):
                shelf = draw.choice(liked if draw.random() < 0.9 else sorted(SHELVES))
                name = draw.choice(SHELVES[shelf].split(","))
                rows.writerow([user, name, datetime.date(2024, 1, 1) + datetime.timedelta(day)])


if __name__ == "__main__":
    main()
