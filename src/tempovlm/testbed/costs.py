"""The cost that each kind of question is meant to have, and how often each cost is asked.

The one place that says so. A scene's questions are drawn by these shares, tests compare drawn scenes with them,
and the report of a training tells what is lost by cost. No policy sees the name of a template.
"""

from __future__ import annotations

from functools import cache

SHARES: dict[str, float] = {"depth": 0.43, "tier": 0.37, "experts": 0.12, "none": 0.08}
"""Cost to its share among the questions of every data set.

depth: one to four steps about what the low tier shows too. tier: print that the low tier does not show, and no
step. experts: a fact of which each appears rarely, about what the low tier shows. none: a look is enough.
"""

_VALUES = "sum three difference twice less range ends top_two over second"
_TEMPLATES: dict[str, str] = {
    "depth": f"""
        count_shape count_color count_both count_not count_others count_neither count_sum count_more
        kind_of_most color_of_extreme shape_of_extreme color_of_second shape_of_second pair_colors triple_colors
        number_compare number_of_beside hop_shape hop_color two_hops three_hops
        both_exist more extreme_is hop_is same_color sum_is number_higher
        compare_legs legs_sum legs_total legs_difference legs_most count_made count_animals count_food
        heavier heaviest beside_object beside_two color_beside_fact color_by_use
        menu_compare menu_extreme score_compare score_winner
        bar_beside bar_beside_value map_direction map_two_steps map_three_steps map_four_steps
        thermo_difference thermo_range thermo_second thermo_after thermo_gap
        beaker_sum beaker_difference beaker_count beaker_after beaker_left
        chain_after chain_two chain_three chain_between
        {" ".join(f"{kind}_{way}" for kind in ("number", "menu", "score", "bar") for way in _VALUES.split())}
        menu_left menu_between bar_between
    """,
    "tier": """
        number_on word_on number_is word_is sign_color bus_number plate_number jersey_number price clock_time
        ticket_number gate_number speed_limit shop_name book_title bottle_label box_label note_says print_on
        caption_number caption_word
    """,
    "experts": """
        fact_owner fact_home fact_since fact_inside fact_friend fact_age owner_is home_is
        fact_company_product fact_company_city fact_company_founder fact_company_decade fact_company_mascot
        fact_company_staff
    """,
    "none": """
        color_of_shape shape_of_color largest shape_exists exists is_color
        fact_use fact_who fact_season fact_made fact_eat fact_live fact_sound fact_legs fact_wheels fact_grow
        fact_kind fact_place fact_wear flag_country flag_capital
        color_of_carrier menu_price score_of
        bar_value bar_color_of map_corner thermo_read beaker_more chain_first
    """,
}


@cache
def costs() -> dict[str, str]:
    """Return each template with its cost, a key of `SHARES`."""
    return {name: cost for cost, names in _TEMPLATES.items() for name in names.split()}


def cost_of(template: str) -> str:
    """Return the cost of a template; 'unknown' for one that is not entered here."""
    return costs().get(template, "unknown")
