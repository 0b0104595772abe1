"""Words for the keys of needles: an adjective, a hyphen, and a noun. Every word is in its list once."""

_ADJECTIVES = """
able absent active agile amber ample ancient angry apt arctic ardent arid ashen atomic austere autumn avid azure bald
bare basic beige big bitter bland blank bleak blind blond blue blunt bold bossy brave brief bright brisk broad broken
bronze brown bulky busy calm candid careful casual cheap chief chilly civil clean clear clever close cloudy coarse
cold common cool copper coral cordial crisp crooked crude cruel curious curly damp daring dark deaf dear deep dense
dim dizzy double dry dull dusty eager early east easy elder elegant empty equal even exact extra faint fair false
famous fancy fast fatal feeble fierce final fine firm first fit flat fleet fluent fond formal fragile frank free fresh
frosty frugal full funny gentle giant glad gloomy golden good grand grave gray great green grim guilty handy happy
hard harsh hasty heavy hidden high hollow holy honest huge humble hungry icy ideal idle infinite inner ivory jolly
joyful just keen kind large last late lazy lean level light little lively local lone long loose loud low loyal lucky
lunar major mellow merry mighty mild minor modest moist narrow native neat new nimble noble north novel numb odd old
open orange outer oval pale patient plain polite poor prime private proud public pure purple quaint quick quiet rapid
rare raw ready red regal rich rigid ripe robust rosy rough round royal rude rural rustic sad safe salty scarlet secret
serene severe shallow sharp shiny short shy silent silver simple slim slow small smart smooth soft solar solid sour
south spare spicy square stable steady
"""

_NOUNS = """
acorn actor album alley anchor ankle antler apple apron arch arm arrow artist atlas aunt author badge baker ball
bamboo banjo bank barn barrel basin basket beach beacon beak bean bear beaver bell belt bench berry bicycle bird
blanket boat bone book boot border bottle bowl branch bread brick bridge broom brush bucket button cabin cable cactus
cake camel camera candle canoe canyon captain card carpet carrot castle cat cave cedar cello chair chalk cheese cherry
chest chimney circle city clock cloth cloud clover coast coin comet compass cook corner cotton cousin crab cradle
crane crater creek crown cup curtain daisy dancer deer desert desk diamond doctor dolphin donkey door dragon drawer
drum duck eagle easel echo egg elbow engine falcon farmer feather fence ferry fiddle field finger fire fish flag flame
flower flute forest fork fountain fox frog garden gate ghost giraffe glacier glove goat grape guitar hammer harbor
harp hat hawk hedge helmet hill honey horn horse hotel house island jacket jaguar jar jewel jungle kettle key king
kite kitten ladder lake lamp lantern leaf lemon letter lighthouse lion lizard lobster lock magnet maple marble market
mask meadow melon mirror mitten monkey moon moose moth mountain mouse needlework nest noodle notebook oak ocean olive
onion orchard otter owl oyster paddle paint palace panda paper parrot path pearl pebble pencil pepper piano pigeon
pillow pilot pine pirate planet plum pocket poem pond pony poppy potato pumpkin puppet puzzle quilt rabbit radio raft
rain raven ribbon river road robin rocket roof rope
"""

ADJECTIVES = _ADJECTIVES.split()
NOUNS = _NOUNS.split()
